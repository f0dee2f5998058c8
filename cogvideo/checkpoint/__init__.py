"""Checkpoints on disk: our own format, and the published one (SwissArmyTransformer, "SAT")."""

from cogvideo.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
