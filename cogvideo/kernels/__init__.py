"""Optional fast kernels, chosen by name; without them everything runs on PyTorch alone."""
