"""Clips as data: vocabulary ids, the layout of frames, prompt text, training batches. No model, no files."""

from cogvideo.sequence.layout import ClipLayout, FrameSpec
from cogvideo.sequence.vocabulary import Vocabulary

__all__ = ["ClipLayout", "FrameSpec", "Vocabulary"]
