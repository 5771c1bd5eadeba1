"""Texts that must have a form: compiling what a request asks for, and which tokens may come next."""
