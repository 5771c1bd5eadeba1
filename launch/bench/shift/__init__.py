"""suite=shift: traffic changes, and drafters that learn from it are compared with those that do not."""
