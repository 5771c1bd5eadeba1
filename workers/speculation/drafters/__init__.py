"""The drafters. Without weights, pure host code: `ngram`, `suffix` and `recycling`."""
