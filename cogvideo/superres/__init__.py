"""CogView2's super-resolution: from a coarse grid of image tokens to a fine one."""
