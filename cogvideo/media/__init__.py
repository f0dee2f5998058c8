"""Video files in and out, cut detection and contact sheets. Nothing here knows of clips or tokens."""
