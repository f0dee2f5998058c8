"""The embedded digits, captions files, clips at several frame rates, token shards and the resumable loader."""
