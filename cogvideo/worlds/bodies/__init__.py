"""Bodies that roll, fall and collide: a small physical world, rendered with captions and exact states."""
