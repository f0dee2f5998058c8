"""What is trained: clips, super-resolution, image tokenizers."""
