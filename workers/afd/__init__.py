"""Attention and FFNs on different ranks: steps of an attention rank, the pool's loop, who belongs to it."""
