"""Part (b) of suite=afd: real models on shaped links."""
