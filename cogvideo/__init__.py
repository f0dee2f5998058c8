"""CogVideo: text-to-video generation by a transformer over image tokens; the command is `cogvideo`."""

__version__ = "0.1.0"
