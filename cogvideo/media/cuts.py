"""Detection of cuts between shots with PySceneDetect's content detector, which the extra `[data]` installs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.media.byte_range import MediaPath
from cogvideo.media.frame_index import VideoInfo
from cogvideo.media.video import iterate_frames

SIDE = 64
"""Shorter edge in pixels at which frames are compared; PySceneDetect itself also downscales."""


def check_installed() -> None:
    """Raises: ValueError that names the extra, if PySceneDetect is missing."""
    try:
        import scenedetect.detectors  # noqa: F401
    except ImportError:
        problem = "clips.cut_threshold needs PySceneDetect, which is not installed; pip install -e '.[data]'"
        raise ValueError(problem) from None


def find_cuts(path: MediaPath, threshold: float, info: VideoInfo | None = None) -> NDArray[np.float64]:
    """Times in seconds of the frames that begin a new shot, ascending. Decodes the whole video.

    `threshold`: mean difference between consecutive frames in hue, saturation and brightness, 0 to 255.
    `info` avoids probing again. Raises: ValueError as `read_video`, or if PySceneDetect is missing.
    """
    check_installed()
    from scenedetect.detectors import ContentDetector

    detector: Any = ContentDetector(threshold=threshold, min_scene_len=0)  # report cuts however close to the last one
    cuts = []
    for index, (frame, time) in enumerate(iterate_frames(path, side=SIDE, info=info)):
        # The detector expects OpenCV's BGR order; it only passes the index through.
        if detector.process_frame(index, np.ascontiguousarray(frame[:, :, ::-1])):
            cuts.append(time)
    return np.array(cuts)
