"""Clips as data: vocabulary ids, the layout of frames, prompt text, training batches. No model, no files."""

from cogvideo.sequence.layout import ClipLayout, FrameSpec, Vocabulary

__all__ = ["ClipLayout", "FrameSpec", "Vocabulary"]
