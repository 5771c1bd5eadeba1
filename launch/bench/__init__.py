"""Measurements: `python -m launch.bench suite=...`. A suite is a function from its options to a `Report`."""
