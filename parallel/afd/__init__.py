"""The two sides of a disaggregated model: edges between ranks, control messages, the link to the pool."""
