"""Training under DeepSpeed: the trainer, its options, losses, held-out evaluation."""
