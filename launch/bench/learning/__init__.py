"""suite=learning: what training beside requests costs them, and how soon it makes way."""
