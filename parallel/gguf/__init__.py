"""Models in one GGUF file, as llama.cpp has them: what they are in Hugging Face's terms. Start with `directory.py`."""
