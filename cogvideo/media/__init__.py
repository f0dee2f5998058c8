"""Video files in and out, GIFs and contact sheets. It knows nothing of clips or tokens."""
