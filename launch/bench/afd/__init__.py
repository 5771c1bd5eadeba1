"""suite=afd: what disaggregating attention and FFN costs and gains."""
