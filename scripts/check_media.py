"""Compare video reading with the ffmpeg program, frame by frame, on files of many kinds that it makes.

    pip install imageio-ffmpeg                     # or have `ffmpeg` on the PATH
    python scripts/check_media.py                  # all files, some minutes
    python scripts/check_media.py --only sar       # those with "sar" in their names
    python scripts/check_media.py --keep DIR       # keep the files in DIR

Times must agree within half a frame, counted from the first frame, and pictures within rounding. Of each file, some
frames are also read on their own, after a seek, and parts are indexed alone. Prints a table; the exit code is 1 if a
file differs.
"""

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from cogvideo.media import frame_index
from cogvideo.media.video import probe_video, read_video

WIDTH, HEIGHT, RATE, SECONDS = 96, 64, 10, 3
SINGLE_FRAMES = 6  # frames per file that are read on their own
SPANS = 4  # parts of a file that are indexed alone
SCALE = "scale=flags=bicubic+accurate_rnd+full_chroma_int"

SMOOTH = "gradients=s={size}:r={rate}:d={seconds}:n=4:seed=7:speed=0.03:c0=0x2040a0:c1=0xd06030:c2=0x30a050:c3=0x808020"


@dataclass(frozen=True)
class Case:
    """A file to make and to compare."""

    name: str
    """Also its file name, whose extension chooses the container."""
    steps: tuple[str, ...]
    """ffmpeg's options. {source} is the test picture, {a} and {b} are intermediate files, {out} is the result."""
    source: str = SMOOTH
    size: str = f"{WIDTH}x{HEIGHT}"
    view: str = ""
    """Filters that turn FFmpeg's picture into the one that should be read."""
    alter: Callable[[Path], None] | None = None
    """Changes the finished file in place."""
    tolerance: float = 1.5
    """Largest allowed mean difference of pixels, out of 255; builds of FFmpeg round differently."""
    even: bool = False
    """Whether to expect 25 evenly spaced frames per second, as FFmpeg repeats times where packets have none."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="check the files with this in their names")
    parser.add_argument("--keep", type=Path, help="folder for the files (default: a temporary one)")
    args = parser.parse_args()
    ffmpeg = find_ffmpeg()
    if ffmpeg is None:
        print("needs the ffmpeg program: pip install imageio-ffmpeg", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checked = failed = 0
        for case in all_cases():
            if args.only not in case.name:
                continue
            checked += 1
            problem = check(ffmpeg, case, folder)
            failed += problem is not None
            print(f"{case.name:40} {problem or 'ok'}", flush=True)
    print(f"{checked - failed} of {checked} files agree")
    return 1 if failed or not checked else 0


def find_ffmpeg() -> str | None:
    """The path of the ffmpeg program; None if there is none."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def check(ffmpeg: str, case: Case, folder: Path) -> str | None:
    """Make a file and compare it -> what differs; None if nothing does."""
    path = folder / case.name
    try:
        make(ffmpeg, case, path)
        times, pictures = reference(ffmpeg, case, path)
    except subprocess.CalledProcessError as error:
        return f"FFmpeg cannot make or read it: {error.stderr.decode(errors='replace').strip().splitlines()[-1:]}"
    try:
        info = probe_video(path)
        frames, seconds = read_video(path, info=info)
    except ValueError as error:
        return f"refused: {error}"
    times = np.arange(len(times)) / 25 if case.even else times - times[0]
    if len(seconds) != len(times):
        return f"{len(seconds)} frames, FFmpeg shows {len(times)}"
    half = 0.5 * float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    if (late := float(np.abs(seconds - times).max())) > half:
        return f"a time differs by {late:.3f} s"
    if frames.shape != pictures.shape:
        return f"pictures of {frames.shape[2]}x{frames.shape[1]}, FFmpeg's {pictures.shape[2]}x{pictures.shape[1]}"
    differences = np.abs(frames.astype(int) - pictures).mean(axis=(1, 2, 3))
    if differences.max() > case.tolerance:
        return f"frame {differences.argmax()} differs by {differences.max():.1f} on average"
    for index in np.unique(np.linspace(0, len(seconds) - 1, SINGLE_FRAMES).astype(int)):
        try:
            single, _ = read_video(path, only=info.seconds[index : index + 1], info=info)
        except ValueError as error:
            return f"frame {index} on its own: {error}"
        if not np.array_equal(single[0], frames[index]):
            return f"frame {index} read on its own differs"
    return check_spans(path, info.seconds)


def check_spans(path: Path, seconds: NDArray[np.float64]) -> str | None:
    """Index parts of a file, skipping packets between them wherever possible -> what differs; None if nothing does."""
    last = float(seconds[-1])
    with patch.object(frame_index, "REORDERED", 0):
        for start, end in pairwise(np.linspace(0, last, SPANS + 1).tolist()):
            found = frame_index.index_frames(path, spans=((start, start), (start, end))).seconds
            within = [times[(times >= start) & (times <= end)] for times in (found, seconds)]
            if not np.array_equal(*within):
                return f"{len(within[0])} of {len(within[1])} frames are found between {start:.2f} s and {end:.2f} s"
    return None


def make(ffmpeg: str, case: Case, path: Path) -> None:
    names = {
        "source": case.source.format(size=case.size, rate=RATE, seconds=SECONDS),
        "a": str(path.with_name("step_a")),
        "b": str(path.with_name("step_b")),
        "out": str(path.absolute()),
    }
    for step in case.steps:
        run(ffmpeg, [word.format(**names) for word in step.split()])
    if case.alter:
        case.alter(path)


def reference(ffmpeg: str, case: Case, path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """FFmpeg's times (N,) in seconds and pictures (N, H, W, 3)."""
    view = ",".join(filter(None, [case.view, SCALE, "format=rgb24", "showinfo"]))
    words = ["-i", str(path.absolute()), "-fps_mode", "passthrough", "-vf", view, "-f", "rawvideo", "-"]
    done = run(ffmpeg, words, level="info")
    log = done.stderr.decode(errors="replace")
    times = [float(time) for time in re.findall(r"showinfo.* pts_time:\s*(\S+)", log)]
    sizes = re.findall(r"showinfo.* s:(\d+)x(\d+) ", log)
    width, height = map(int, sizes[0])
    pictures = np.frombuffer(done.stdout, np.uint8)[: len(times) * height * width * 3]
    order = np.arange(len(times)) if case.even else np.argsort(times, kind="stable")
    return np.array(times)[order], pictures.reshape(-1, height, width, 3).astype(int)[order]


def run(ffmpeg: str, words: list[str], level: str = "error") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [ffmpeg, "-hide_banner", "-nostdin", "-v", level, "-y", *words], check=True, capture_output=True
    )


SOURCE = "-f lavfi -i {source}"
X264 = "-c:v libx264 -pix_fmt yuv420p -qp 12"
X265 = "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=error:qp=12"
LOSSLESS = "-c:v ffv1"
SQUARE = "scale='max(1,round(iw*sar))':ih:flags=bicubic+accurate_rnd+full_chroma_int,setsar=1"
BLACK_GROUND = "format=gbrap,premultiply=inplace=1,format=rgb24"


def plain(name: str, options: str, **more: object) -> Case:
    return Case(name, (f"{SOURCE} {options} {{out}}",), **more)  # type: ignore[arg-type]


def copied(name: str, options: str, container: str, command: str, **more: object) -> Case:
    """Encode into a container, then run `command` on that file, {a}."""
    return Case(name, (f"{SOURCE} {options} -f {container} {{a}}", f"{command} {{out}}"), **more)  # type: ignore[arg-type]


def all_cases() -> Iterator[Case]:
    yield from codecs()
    yield from timing()
    yield from geometry()
    yield from colours()
    yield from oddities()


def codecs() -> Iterator[Case]:
    """Every container with the codecs that it usually holds, and with several patterns of key frames."""
    h264, h265, mpeg4 = f"{X264} -bf 2", X265, "-c:v mpeg4 -q:v 2"
    vp8, vp9 = "-c:v libvpx -pix_fmt yuv420p -b:v 1M", "-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 1M"
    av1 = "-c:v libsvtav1 -crf 20 -svtav1-params lp=1"
    mpeg2, mpeg1 = "-c:v mpeg2video -q:v 2 -r 25", "-c:v mpeg1video -q:v 2 -r 25"
    mjpeg = "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"
    formats = {
        "mp4": dict(h264=h264, h265=h265, mpeg4=mpeg4, vp9=vp9, av1=av1, mjpeg=mjpeg),
        "mov": dict(h264=h264, h265=h265, prores="-c:v prores_ks", mjpeg=mjpeg, qtrle="-c:v qtrle", png="-c:v png"),
        "mkv": dict(
            **dict(
                h264=h264, h265=h265, mpeg4=mpeg4, vp8=vp8, vp9=vp9, av1=av1, mpeg2=mpeg2, mjpeg=mjpeg, ffv1=LOSSLESS
            ),
            **dict(huffyuv="-c:v huffyuv", utvideo="-c:v utvideo", theora="-c:v libtheora -q:v 9", png="-c:v png"),
            **dict(rgb="-c:v libx264rgb -qp 12", raw="-c:v rawvideo -pix_fmt yuv420p", vp8alt=f"{vp8} -auto-alt-ref 1"),
        ),
        "webm": dict(vp8=vp8, vp9=vp9, av1=av1),
        "avi": dict(
            **dict(h264=h264, mpeg4=mpeg4, mpeg4b=f"{mpeg4} -bf 2", mjpeg=mjpeg, huffyuv="-c:v huffyuv", ffv1=LOSSLESS),
            **dict(raw="-c:v rawvideo -pix_fmt bgr24", msmpeg4="-c:v msmpeg4v2 -q:v 2"),
        ),
        "ts": dict(h264=h264, h265=h265, mpeg2=mpeg2, mpeg2b=f"{mpeg2} -bf 2", mpeg4=mpeg4),
        "mpg": dict(mpeg1=mpeg1, mpeg1b=f"{mpeg1} -bf 2", mpeg2=mpeg2, mpeg2b=f"{mpeg2} -bf 2"),
        "flv": dict(flv1="-c:v flv1 -q:v 2", h264=h264),
        "ogv": dict(theora="-c:v libtheora -q:v 9"),
        "wmv": dict(wmv2="-c:v wmv2 -q:v 2"),
        "nut": dict(h264=h264, mpeg4=mpeg4, ffv1=LOSSLESS),
        "mxf": dict(mpeg2=mpeg2),
        "3gp": dict(mpeg4=mpeg4, h264=h264),
        "gif": dict(gif="-c:v gif"),
        "apng": dict(apng="-c:v apng -plays 0"),
        "h264": dict(raw=h264),
        "hevc": dict(raw=h265),
        "m2v": dict(raw=mpeg2),
        "ivf": dict(vp8=vp8, vp9=vp9, av1=av1),
        "y4m": dict(raw="-pix_fmt yuv420p"),
        "mjpeg": dict(raw=mjpeg),
    }
    for ending, options in formats.items():
        for codec, words in options.items():
            yield plain(f"{codec}.{ending}", words, even=(codec, ending) == ("mpeg2b", "mpg"))
    for ending in ("mp4", "mkv", "ts", "avi"):
        yield plain(f"gop1.{ending}", f"{X264} -g 1")
        yield plain(f"gop7.{ending}", f"{X264} -g 7 -bf 3")
        yield plain(f"opengop.{ending}", f"{X264} -g 8 -bf 3 -x264-params open-gop=1")
        yield plain(f"pyramid.{ending}", f"{X264} -bf 7 -x264-params b-pyramid=normal:b-adapt=0")
        yield plain(f"refresh.{ending}", f"{X264} -g 10 -x264-params intra-refresh=1")
    for ending in ("mp4", "mkv", "ts"):
        yield plain(f"opengop265.{ending}", f"{X265}:open-gop=1:keyint=8:bframes=4")
        yield plain(f"frag.{ending}", f"{X264} -g 7 -movflags +frag_keyframe+empty_moov")


def timing() -> Iterator[Case]:
    """Variable rates, late and negative starts, edit lists, streams that begin between key frames, joined files."""
    vfr = "-vf settb=1/1000,setpts='(N+mod(N*N,5)*0.2)/10/TB' -enc_time_base 1/1000 -fps_mode passthrough"
    for ending, codec in (
        *(("mp4", f"{X264} -bf 2"), ("mkv", f"{X264} -bf 2"), ("ts", f"{X264} -bf 2"), ("mov", "-c:v mjpeg -q:v 2")),
        *(
            ("webm", "-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 1M"),
            ("flv", f"{X264} -bf 2"),
            ("gif", ""),
            ("nut", X264),
            ("mkv265", X265),
        ),
        *(("mp4mjpeg", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"), ("asf", "-c:v mpeg4 -q:v 2"), ("apng", "-c:v apng")),
    ):
        container = {"mkv265": "mkv", "mp4mjpeg": "mp4"}.get(ending, ending)
        yield plain(f"vfr_{ending}.{container}", f"{vfr} {codec}")
    for ending in ("mp4", "mkv", "ts", "mov", "flv", "nut"):
        yield plain(f"late.{ending}", f"{X264} -bf 2 -output_ts_offset 7.3")
        yield copied(f"copycut.{ending}", f"{X264} -bf 2 -g 12", "mp4", "-ss 1.3 -i {a} -c copy")
        yield copied(f"copycut265.{ending}", f"{X265}:bframes=3:keyint=12", "mp4", "-ss 1.3 -i {a} -c copy -strict -2")
    for ending in ("mp4", "mov"):
        for start, end in ((0.5, 2.5), (1.25, 2.0), (0.0, 1.7), (2.6, 2.9)):
            for codec, words in (
                ("264", f"{X264} -bf 3 -g 30"),
                ("265", f"{X265}:bframes=3"),
                ("m4", "-c:v mpeg4 -bf 2"),
            ):
                yield plain(
                    f"trim{codec}_{start}_{end}.{ending}",
                    words,
                    alter=lambda path, span=(start, end): trim(path, *span),
                )
    yield plain("noedits.mp4", f"{X264} -bf 3 -use_editlist 0")
    yield plain("negative.mp4", f"{X264} -bf 3 -use_editlist 0 -movflags negative_cts_offsets")
    for ending, words in (
        ("h264.ts", f"{X264} -bf 2 -g 12"),
        ("h265.ts", f"{X265}:keyint=12"),
        ("m2.ts", "-c:v mpeg2video -r 25 -bf 2"),
    ):
        yield plain(f"midgop_{ending}", words, alter=drop_front)
        yield plain(f"joined_{ending}", words, alter=join)
    yield plain("midgop.mpg", "-c:v mpeg2video -r 25 -bf 2 -q:v 2", alter=drop_front_of_mpg, even=True)
    yield copied(
        "shuffled.mkv",
        "-c:v mjpeg -q:v 2",
        "matroska",
        "-i {a} -c copy -bsf:v setts=pts='(N-mod(N,4)+3-mod(N,4))*100':dts=N*100",
    )
    for ending in ("mp4", "mkv", "ts", "mov"):
        yield Case(
            f"sound.{ending}",
            (
                f"{SOURCE} -f lavfi -i sine=d=4 {X264} -bf 2 -f nut {{a}}",
                "-i {a} -itsoffset 0.4 -i {a} -map 1:v -map 0:a -c:v copy -c:a aac {out}",
            ),
        )
    for ending in ("mp4", "avi", "mkv"):
        yield plain(f"miscounted.{ending}", f"{X264} -g 12" if ending != "avi" else "-c:v mpeg4", alter=miscount)


def geometry() -> Iterator[Case]:
    """Pixel aspect ratios, rotated and mirrored pictures, odd sizes."""
    for sar in ("2/1", "1/2", "4/3", "8/9", "64/45"):
        for ending, words in (
            *((".mp4", X264), (".mkv", X264), (".ts", X264), ("_h265.mp4", X265), (".mov", "-c:v mjpeg -q:v 2")),
            *((".avi", "-c:v mpeg4 -q:v 2"), (".nut", LOSSLESS)),
        ):
            yield plain(f"sar{sar.replace('/', 'to')}{ending}", f"-vf setsar={sar} {words}", view=SQUARE)
        yield copied(
            f"containersar{sar.replace('/', 'to')}.mkv",
            X264,
            "mp4",
            f"-i {{a}} -c copy -aspect {Fraction(sar) * WIDTH / HEIGHT}".replace("/", ":"),
            view=SQUARE,
        )
    yield plain("sar.mpg", "-c:v mpeg2video -r 25 -q:v 2 -aspect 16:9", view=SQUARE)
    for ending in ("mp4", "mov", "mkv"):
        for angle in (0, 90, 180, 270):
            for mirror in ("", "-display_hflip", "-display_vflip"):
                name = f"turn{angle}{mirror[9:]}.{ending}"
                yield copied(name, X264, "mp4", f"-display_rotation {angle} {mirror} -i {{a}} -c copy")
    for size in ("95x63", "33x17", "2x2", "17x130"):
        for ending, words in (
            ("mkv", f"{LOSSLESS} -pix_fmt yuv420p"),
            ("mp4", f"{X264} -pix_fmt yuv444p"),
            ("gif", ""),
            ("webm", "-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 1M"),
            ("mov", "-c:v png"),
        ):
            if (size, ending) != ("2x2", "webm"):
                yield plain(f"odd{size}.{ending}", words, size=size)


def colours() -> Iterator[Case]:
    """Colour matrices and ranges, bit depths, pixel formats, alpha, HDR, interlaced frames."""
    for matrix in ("bt709", "smpte170m", "bt2020nc", "fcc", "smpte240m"):
        for span in ("tv", "pc"):
            scale, tag = f"scale=out_color_matrix={matrix}:out_range={span}", f"colorspace={matrix}:range={span}"
            tags = f"-vf {scale},format={{}},setparams={tag}"
            yield plain(f"{matrix}_{span}.mp4", f"{tags.format('yuv420p')} -c:v libx264 -qp 8")
            yield plain(f"{matrix}_{span}_10.mkv", f"{tags.format('yuv420p10')} -c:v libx264 -qp 8")
            yield plain(f"{matrix}_{span}_444.mkv", f"{tags.format('yuv444p')} -c:v ffv1")
    for format in (
        *(
            "yuv420p",
            "yuv422p",
            "yuv444p",
            "yuv410p",
            "yuv411p",
            "yuv440p",
            "gray",
            "gray10le",
            "gray16le",
            "yuv420p10le",
        ),
        *(
            "yuv422p10le",
            "yuv444p10le",
            "yuv420p12le",
            "yuv444p16le",
            "gbrp",
            "gbrp10le",
            "gbrp16le",
            "bgr0",
            "rgb48le",
        ),
    ):
        yield plain(f"{format}.mkv", f"-pix_fmt {format} -c:v ffv1")
    for format in ("rgb24", "rgb48be", "gray", "gray16be", "pal8", "monob"):
        yield plain(f"png_{format}.mov", f"-pix_fmt {format} -c:v png")
    for format in ("rgb555le", "rgb565le", "nv12", "yuyv422", "uyvy422", "bgr24", "rgb8"):
        yield plain(f"raw_{format}.nut", f"-pix_fmt {format} -c:v rawvideo")
    clear = "-vf format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*X/W'"
    for name, words in (
        *(("png.mov", "-c:v png"), ("qtrle.mov", "-c:v qtrle"), ("ffv1.mkv", "-pix_fmt bgra -c:v ffv1")),
        *(("prores.mov", "-pix_fmt yuva444p10le -c:v prores_ks"), ("yuva.mkv", "-pix_fmt yuva420p -c:v ffv1")),
        *(("utvideo.mkv", "-c:v utvideo"), ("apng.apng", "-c:v apng"), ("ya8.mov", "-pix_fmt ya8 -c:v png")),
    ):
        yield plain(f"alpha_{name}", f"{clear} {words}", view=BLACK_GROUND)
    for name, transfer in (("pq", "smpte2084"), ("hlg", "arib-std-b67")):
        params = f"hdr-opt=0:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
        tags = f"-color_primaries bt2020 -color_trc {transfer} -colorspace bt2020nc"
        for ending in ("mp4", "mkv"):
            tagged = f"color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc:range=tv"
            words = f"-vf format=yuv420p10le,setparams={tagged}"
            yield plain(
                f"{name}.{ending}",
                f"{words} -c:v libx265 -x265-params log-level=error:qp=8:{params} {tags}",
                tolerance=4.0,
                view="scale=out_transfer=bt709:out_primaries=bt709:flags=bicubic+accurate_rnd+full_chroma_int,format=rgb24",
            )
    for order in ("tff", "bff"):
        woven = f"-vf tinterlace=mode=interleave_{'top' if order == 'tff' else 'bottom'},setfield={order}"
        for ending, words in (
            ("ts", f"{X264} -flags +ildct+ilme -x264-params {order}=1"),
            ("mkv", f"{X264} -flags +ildct+ilme -x264-params {order}=1"),
            ("mpg", "-c:v mpeg2video -q:v 2 -flags +ildct+ilme -r 25"),
            ("mov", "-c:v prores_ks -flags +ildct"),
        ):
            yield plain(
                f"interlaced_{order}.{ending}", f"{woven} {words}", view="bwdif=mode=send_frame:deint=interlaced"
            )


def oddities() -> Iterator[Case]:
    """Several streams, cover pictures, odd file names."""
    cover = "-frames:v 1 -c:v mjpeg -f image2 {b}"
    for ending in ("mp4", "mkv", "mov"):
        for name, maps in (
            ("first", "-map 1:v -map 0:v -disposition:v:0 attached_pic"),
            ("second", "-map 0:v -map 1:v -disposition:v:1 attached_pic"),
        ):
            if ending != "mov":
                yield Case(
                    f"cover_{name}.{ending}",
                    (
                        f"{SOURCE} {X264} -f mp4 {{a}}",
                        f"{SOURCE} -vf negate {cover}",
                        f"-i {{a}} -f mjpeg -i {{b}} {maps} -c copy {{out}}",
                    ),
                )
        for name, options in (
            *(
                ("larger", "-map 1:v -map 0:v"),
                ("default", "-map 1:v -map 0:v -disposition:v:0 default -disposition:v:1 0"),
            ),
            *(
                ("default2", "-map 0:v -map 1:v -disposition:v:0 0 -disposition:v:1 default"),
                ("equal", "-map 0:v -map 0:v"),
            ),
        ):
            yield Case(
                f"two_{name}.{ending}",
                (
                    f"{SOURCE} {X264} -f mp4 {{a}}",
                    f"{SOURCE} -vf negate,scale=64:48,setsar=1 {X264} -f mp4 {{b}}",
                    f"-i {{a}} -i {{b}} {options} -c copy {{out}}",
                ),
                tolerance=2.5,  # the small one has as many colours in fewer pixels
            )
    for name in (
        "a%03d.mp4",
        "line\nbreak.mkv",
        "-dash.mp4",
        "http:x.ts",
        "file:x.mp4",
        "quote'\".mkv",
        "{}[*]?.mp4",
        "~.mp4",
        "\udcff\udcfe.mp4",
    ):
        yield plain(name, X264)


def trim(path: Path, start: float, end: float) -> None:
    """Rewrite an mp4's edit list so that it shows `start` to `end` in seconds, as a phone does."""
    data = bytearray(path.read_bytes())

    def box(names: tuple[bytes, ...], first: int, last: int) -> int:
        while first < last:
            size, name = struct.unpack(">I4s", data[first : first + 8])
            if name == names[0]:
                return first if len(names) == 1 else box(names[1:], first + 8, first + size)
            first += size
        raise ValueError(names)

    movie = box((b"moov", b"mvhd"), 0, len(data))
    media = box((b"moov", b"trak", b"mdia", b"mdhd"), 0, len(data))
    edits = box((b"moov", b"trak", b"edts", b"elst"), 0, len(data))
    movie_scale = struct.unpack(">I", data[movie + 20 : movie + 24])[0]
    media_scale = struct.unpack(">I", data[media + 20 : media + 24])[0]
    _, first = struct.unpack(">Ii", data[edits + 16 : edits + 24])
    data[edits + 16 : edits + 24] = struct.pack(
        ">Ii", int((end - start) * movie_scale), int(first + start * media_scale)
    )
    path.write_bytes(data)


def drop_front(path: Path) -> None:
    """Cut the first fifth off a transport stream, but keep its tables."""
    data = path.read_bytes()
    path.write_bytes(data[: 3 * 188] + data[len(data) // 188 // 5 * 188 :])


def drop_front_of_mpg(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 2048 // 5 * 2048 :])


def join(path: Path) -> None:
    """Append a transport stream to itself, so that its timestamps restart."""
    path.write_bytes(2 * path.read_bytes())


def miscount(path: Path) -> None:
    """Make the headers claim more frames, or a longer duration, than the file has."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".avi":
        for place in (data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32):
            data[place : place + 4] = struct.pack("<I", 90)
    elif path.suffix == ".mp4":
        for name, place in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
            at = data.index(name) + place
            data[at : at + 4] = struct.pack(">I", 2 * struct.unpack(">I", data[at : at + 4])[0])
    else:
        at = data.index(b"\x44\x89\x88") + 3
        data[at : at + 8] = struct.pack(">d", 90_000.0)
    path.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
