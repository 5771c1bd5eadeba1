"""Device code and, for each kernel, the plain-torch definition it must equal."""
