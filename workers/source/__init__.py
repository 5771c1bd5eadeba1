"""Where a model comes from: a directory, a GGUF file, or a package of an index. Start with `resolve.py`."""
