"""What can be trained: the video transformer, super-resolution and the image tokenizer, each as a task."""
