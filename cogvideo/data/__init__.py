"""Captions files, clips at several frame rates, token shards, datasets and training batches."""
