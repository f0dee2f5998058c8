"""Training: what is learned, the optimiser and its schedule, DeepSpeed, exact state on disk, metrics, and the loop."""
