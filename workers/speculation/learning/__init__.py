"""The drafter keeps learning from live traffic: what is captured, and how it comes to whoever learns from it."""
