"""suite=hostile: what honest clients notice of strangers' requests and connections."""
