"""Converts decoded frames to RGB as a player shows it: square pixels, upright, SDR, composited, scaled, framed."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter
from numpy.typing import NDArray

MAX_PIXELS = 2**27  # of a scaled frame
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
WIDE_GAMUT = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
SDR: dict[str, Any] = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
EXIF_TURNS = (  # per orientation 1 to 8: transpose, then mirror left and right, then mirror top and bottom
    *((False, False, False), (False, True, False), (False, True, True), (False, False, True)),
    *((True, False, False), (True, True, False), (True, True, True), (True, False, True)),
)
ROTATIONS = {0: EXIF_TURNS[0], -90: EXIF_TURNS[5], 180: EXIF_TURNS[2], -180: EXIF_TURNS[2], 90: EXIF_TURNS[7]}

Fit = Literal["crop", "pad"]
Place = Literal["center", "top"]


@dataclass(frozen=True)
class Framing:
    """How a frame is made square. It is scaled by the same factor in both directions."""

    side: int
    """Height and width in pixels."""
    fit: Fit = "crop"
    """crop: scale the shorter edge to `side` and cut off the rest; pad: scale the longer edge, add black borders."""
    place: Place = "center"
    """Which part a crop keeps of a frame that is taller than wide; a wide one always keeps its centre."""


class PixelReader:
    """Converts the frames of one file; reuses the scaler between them."""

    def __init__(self, framing: Framing | None, pixel_aspect: Fraction, exif_orientation: int | None):
        """`framing` None: full size. `pixel_aspect`, `exif_orientation`: see `VideoInfo`."""
        self._framing, self._pixel_aspect, self._exif_orientation = framing, pixel_aspect, exif_orientation
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def read(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """One decoded frame -> (H, W, 3) RGB. Without framing, all frames get the first one's size.

        Raises: ValueError if the frame would be too large.
        """
        turn = _turn(frame) if self._exif_orientation is None else EXIF_TURNS[self._exif_orientation - 1]
        width, height = self._scaled_size(frame)
        if width * height > MAX_PIXELS:
            raise ValueError(f"a frame of {frame.width}x{frame.height} pixels would be scaled to {width}x{height}")
        image = self._rgb(_composed(frame), width, height)
        if self._framing is None:
            return np.ascontiguousarray(_turned(image, turn))
        side = self._framing.side
        if self._framing.fit == "pad":
            image = _turned(image, turn)
            square = np.zeros((side, side, 3), np.uint8)
            top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
            square[top : top + image.shape[0], left : left + image.shape[1]] = image
            return square
        if self._framing.place == "top":
            image = _turned(image, turn)
            left = (image.shape[1] - side) // 2
            return np.ascontiguousarray(image[:side, left : left + side])
        top, left = (height - side) // 2, (width - side) // 2
        return np.ascontiguousarray(_turned(image[top : top + side, left : left + side], turn))

    def _scaled_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Width and height that a frame is scaled to, before it is turned."""
        shown_width = frame.width if self._pixel_aspect == 1 else float(frame.width * self._pixel_aspect)
        if self._framing is None:
            self._size = self._size or (max(1, round(shown_width)), frame.height)
            return self._size
        side = self._framing.side
        if self._framing.fit == "pad":
            scale = side / max(shown_width, frame.height)
            return max(1, round(shown_width * scale)), max(1, round(frame.height * scale))
        scale = side / min(shown_width, frame.height)
        return max(side, round(shown_width * scale)), max(side, round(frame.height * scale))

    def _rgb(self, frame: av.VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
        hdr = frame.color_trc in WIDE_GAMUT or frame.color_primaries == ColorPrimaries.BT2020
        reformat, sdr = self._reformatter.reformat, SDR if hdr else {}
        pixels: Any = reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1, **sdr).to_ndarray()
        return np.asarray(pixels, np.uint8)


def deinterlace(before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None) -> av.VideoFrame:
    """Make an interlaced frame progressive, with FFmpeg's bwdif, which uses the frames before and after, if any."""
    kind = (frame.width, frame.height, frame.format.name)
    frames = [
        other for other in (before, frame, after) if other and (other.width, other.height, other.format.name) == kind
    ]
    graph = Graph()
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/1",
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    graph.link_nodes(source, graph.add("bwdif", mode="send_frame", deint="interlaced"), graph.add("buffersink"))
    graph.configure()
    for time, other in enumerate(frames):
        other.pts, other.time_base = time, Fraction(1)
        graph.push(other)
    graph.push(None)
    for _ in range(frames.index(frame)):
        graph.vpull()
    return graph.vpull()


def _composed(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame on a black background if any of it is transparent, else as it is."""
    if frame.format.name != "pal8" and not any(component.is_alpha for component in frame.format.components):
        return frame
    pixels = frame.reformat(format="rgba", interpolation=SCALING, threads=1).to_ndarray()
    alpha = pixels[:, :, 3:].astype(np.uint16)
    if alpha.min() == 255:
        return frame
    return av.VideoFrame.from_ndarray(((pixels[:, :, :3] * alpha + 127) // 255).astype(np.uint8), format="rgb24")


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a frame's display matrix says to turn it, as in EXIF_TURNS; to the nearest quarter turn."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the kind of some other side data
        return ROTATIONS[round(frame.rotation / 90) * 90]
    if data is None:
        return EXIF_TURNS[0]
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(data), np.int32).reshape(3, 3).tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _turned(image: NDArray[np.uint8], turn: tuple[bool, bool, bool]) -> NDArray[np.uint8]:
    transpose, mirror, flip = turn
    if transpose:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if flip else 1, :: -1 if mirror else 1]
