"""Training: tasks, the loop, the optimiser, the DeepSpeed engine, resumable checkpoints, metrics and exports."""
