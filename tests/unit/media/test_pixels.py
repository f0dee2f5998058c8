"""From decoded frames to pixels: shapes of pixels, turned pictures, crops, borders, alpha and HDR."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import Image, ImageOps

from cogvideo.media.pixels import Framing, PixelReader
from cogvideo.media.video import probe_video, read_video


def frame_of(pixels):
    return av.VideoFrame.from_ndarray(np.asarray(pixels, np.uint8), format="rgb24")


def read(pixels, framing=None, aspect=Fraction(1), orientation=1):
    return PixelReader(framing, aspect, orientation).read(frame_of(pixels))


def picture(height, width):
    """Blocks of random colours."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3))
    return np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(picture(48, 80)).save(path, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    got = read_video(path)[0][0]
    assert got.shape == wanted.shape and np.abs(got - wanted).mean() < 4


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_videos_are_turned_as_their_display_matrix_says(tmp_path, angle, mirror):
    path, pixels = tmp_path / "a.mp4", picture(48, 80)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv444p"
        stream.set_display_rotation(angle, hflip=mirror)
        frame = frame_of(pixels).reformat(format="yuv444p")
        container.mux([*stream.encode(frame), *stream.encode()])
    wanted = np.rot90(pixels, angle // 90)
    mirrored = [wanted[:, ::-1], wanted[::-1]] if mirror else [wanted]
    got = read_video(path)[0][0].astype(int)
    assert min(np.abs(got - image).mean() if got.shape == image.shape else 255 for image in mirrored) < 6


def test_pixels_become_square():
    wide = np.zeros((32, 32, 3))
    wide[:, 16:] = 200
    assert read(wide, aspect=Fraction(2)).shape == (32, 64, 3)
    assert read(wide, aspect=Fraction(1, 2)).shape == (32, 16, 3)
    shown = read(picture(32, 32), Framing(32), Fraction(2)).astype(int)
    assert np.abs(shown - np.repeat(picture(32, 32)[:, 8:24], 2, axis=1)).mean() < 12


def test_fits_never_stretch():
    tall = np.zeros((60, 20, 3))
    tall[:20], tall[20:40], tall[40:] = 50, 100, 150
    assert read(tall, Framing(20)).mean() == 100
    assert read(tall, Framing(20, place="top")).mean() == 50
    padded = read(tall, Framing(60, "pad"))
    assert padded.shape == (60, 60, 3) and (padded[:, 20:40] == tall).all()
    assert not padded[:, :20].any() and not padded[:, 40:].any()
    assert (read(tall.transpose(1, 0, 2), Framing(20, place="top")) == 100).all(), "a wide frame keeps its centre"


def test_the_top_is_that_of_the_turned_frame():
    wide = np.zeros((20, 60, 3))
    wide[:, :20], wide[:, 40:] = 50, 150
    assert read(wide, Framing(20, place="top"), orientation=6).mean() == 50
    assert read(wide, Framing(20, place="top"), orientation=8).mean() == 150


def test_transparent_pixels_lie_on_black(tmp_path):
    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[:, :8, 3], pixels[:, 8:, 3] = 0, 255
    for ending in ("png", "webp", "gif"):
        Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
        got = read_video(tmp_path / f"a.{ending}")[0][0]
        assert got[:, :8].max() <= 4 and got[:, 8:].min() >= 196, ending


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "CMYK"])
def test_pictures_of_every_kind_are_read(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (16, 1)))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    wanted = np.asarray((grey if mode == "I;16" else image).convert("RGB")).astype(int)
    assert np.abs(read_video(path)[0][0] - wanted).mean() < 3


def test_hdr_becomes_sdr():
    frame = frame_of(np.full((16, 16, 3), 128)).reformat(format="yuv420p10le", dst_colorspace=Colorspace.ITU709)
    frame.color_trc, frame.color_primaries = ColorTrc.SMPTE2084, ColorPrimaries.BT2020
    bright = PixelReader(None, Fraction(1), None).read(frame)
    assert bright.min() > 150, "half the PQ scale is about as bright as SDR's paper white"
    frame.color_trc, frame.color_primaries = ColorTrc.BT709, ColorPrimaries.BT709
    assert abs(int(PixelReader(None, Fraction(1), None).read(frame).mean()) - 128) <= 2


def test_a_change_of_size_keeps_the_first_size(tmp_path):
    reader = PixelReader(None, Fraction(1), None)
    assert reader.read(frame_of(np.zeros((16, 24, 3)))).shape == (16, 24, 3)
    assert reader.read(frame_of(np.zeros((32, 48, 3)))).shape == (16, 24, 3)


def test_frames_that_would_be_scaled_beyond_all_measure_are_refused(tmp_path):
    Image.new("RGB", (30000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line\.png: a frame of 30000x1 pixels would be scaled"):
        read_video(tmp_path / "line.png", side=512, only=probe_video(tmp_path / "line.png").seconds)
