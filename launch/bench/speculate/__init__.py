"""suite=speculate: what drafts give over plain decoding, on traffic that every machine with Python has."""
