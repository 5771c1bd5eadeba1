"""Tokens and text: the stream of what can be shown, chat templates, bytes of tokens."""
