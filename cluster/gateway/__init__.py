"""The HTTP side, a program of its own: OpenAI protocol, text, router, and a link to every engine."""
