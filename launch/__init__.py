"""One file per thing a person runs, and the Hydra configuration they read."""
