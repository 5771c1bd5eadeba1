"""Speculation: drafters propose tokens, a step verifies them; `drafter` is what both know of each other."""
