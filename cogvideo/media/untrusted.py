"""Looks at a picture or video that a stranger sent, before anything decodes it.

Only plain containers are opened: others (playlists, concatenations, device names) make FFmpeg read what they name,
files of this machine or addresses in its network.
"""

from pathlib import Path

import av

from cogvideo.media.video import VideoInfo, probe_video

CONTAINERS = "mov,mp4,matroska,webm,avi,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
"""FFmpeg's names."""
MAX_PIXELS = 16_000_000
MAX_SECONDS = 60.0


def check_untrusted(path: Path, *, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS) -> VideoInfo:
    """What a stranger's file says of itself, once it is known to be safe to read.

    Raises: ValueError, in one line, for any other container, damage, or too large a file.
    """
    try:
        with av.open(str(path), options={"format_whitelist": CONTAINERS}):
            pass
        info = probe_video(path)
    except (av.error.FFmpegError, ValueError):
        raise ValueError(f"{path.name} is no picture or video that can be read; send png, jpeg, gif or mp4") from None
    if info.width * info.height > max_pixels:
        raise ValueError(f"{path.name} has {info.width}x{info.height} pixels; send at most {max_pixels} in all")
    if info.duration > max_seconds:
        raise ValueError(f"{path.name} lasts {info.duration:.0f} seconds; send at most {max_seconds:g}")
    return info
