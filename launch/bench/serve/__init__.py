"""suite=serve: load on an OpenAI endpoint."""
