"""Text and image tokenizers, and the joint vocabulary they feed. Import the submodules: this face stays cheap."""
