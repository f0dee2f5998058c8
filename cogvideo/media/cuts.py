"""Where a video cuts from one shot to another, by PySceneDetect's content detector: the extra `[data]`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.media.video import iterate_frames

SIDE = 64
"""Pixels of the shorter edge at which frames are compared; PySceneDetect too looks at small ones."""


def check_installed() -> None:
    """Raises: ValueError naming the extra where PySceneDetect is missing."""
    try:
        import scenedetect.detectors  # noqa: F401
    except ImportError:
        problem = "clips.cut_threshold needs PySceneDetect, which is not installed; pip install 'cogvideo[data]'"
        raise ValueError(problem) from None


def find_cuts(path: str | Path, threshold: float) -> NDArray[np.float64]:
    """Times in seconds of the frames that begin a new shot, ascending; decodes the whole video.

    `threshold`: mean difference of neighbouring frames in hue, saturation and brightness, 0 to 255.
    Raises: ValueError as `read_video`, or where PySceneDetect is missing.
    """
    check_installed()
    from scenedetect.detectors import ContentDetector

    detector: Any = ContentDetector(threshold=threshold, min_scene_len=0)  # every cut counts, however close to the last
    cuts = []
    for index, (frame, time) in enumerate(iterate_frames(path, side=SIDE)):
        # It passes the number through, and wants OpenCV's order of colours.
        if detector.process_frame(index, np.ascontiguousarray(frame[:, :, ::-1])):
            cuts.append(time)
    return np.array(cuts)
