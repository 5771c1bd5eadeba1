"""suite=failures: what clients notice when processes die under load."""
