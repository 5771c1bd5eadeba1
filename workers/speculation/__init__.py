"""Speculative decoding: a drafter proposes several tokens, the target checks them in one step."""
