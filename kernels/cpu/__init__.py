"""Kernels of CPU ranks in C++, on torch's own threads. `native.py` says what they compute; `build.py` compiles them."""
