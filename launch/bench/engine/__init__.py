"""suite=engine: one CPU engine beside others on the same model, and its kernels beside those of torch."""
