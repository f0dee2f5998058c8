"""Small media files that claim or unpack to far more than they hold: `hostile_media()`.

They are written box by box, since no encoder makes them. `scripts/check_hostile.py` measures what reading them takes.
"""

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

MANY = 60_000_000
"""Samples that an index of a few bytes claims."""


def box(kind: str, *parts: bytes) -> bytes:
    """A box of an MP4, or a chunk of a RIFF file if `kind` begins with a capital."""
    data = b"".join(parts)
    return struct.pack(">I", len(data) + 8) + kind.encode() + data


def full(kind: str, *numbers: int, flags: int = 0, data: bytes = b"") -> bytes:
    """A box with version 0, flags and numbers of 32 bits."""
    return box(kind, struct.pack(f">I{len(numbers)}I", flags, *numbers), data)


def jpeg(side: int = 16, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "JPEG", **options)
    return stream.getvalue()


def table(*, stts: bytes, stsc: bytes, stsz: bytes, more: bytes = b"") -> bytes:
    """An MP4's sample table: one JPEG of 16x16 pixels per sample."""
    entry = struct.pack(">6xHHHIIIHHIIIH32xHh", 1, 0, 0, 0, 0, 0, 16, 16, 0x480000, 0x480000, 0, 1, 24, -1)
    stsd = full("stsd", 1, data=box("jpeg", entry))
    return box("stbl", stsd, stts, stsc, stsz, full("stco", 1, 48), more)


def mp4(stbl: bytes, *, tracks: int = 1, edits: bytes = b"", moov: bytes = b"", after: bytes = b"") -> bytes:
    picture = jpeg()
    head = box("ftyp", b"isom\0\0\2\0isom" + b"free" * 5)  # the picture begins at byte 48
    matrix = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    traks = b""
    for number in range(1, tracks + 1):
        tkhd = full(
            "tkhd", 0, 0, number, 0, 600, 0, 0, 0, 0, flags=7, data=matrix + struct.pack(">II", 16 << 16, 16 << 16)
        )
        mdhd = full("mdhd", 0, 0, 600, 600, 0)
        hdlr = box("hdlr", bytes(8) + b"vide" + bytes(13))
        dinf = box("dinf", full("dref", 1, data=full("url ", flags=1)))
        minf = box("minf", full("vmhd", 0, 0, flags=1), dinf, stbl)
        traks += box("trak", tkhd, edits, box("mdia", mdhd, hdlr, minf))
    mvhd = full("mvhd", 0, 0, 600, 600, 1 << 16, 1 << 24, 0, 0, data=matrix + bytes(24) + struct.pack(">I", tracks + 1))
    return head + box("mdat", picture) + box("moov", mvhd, traks, moov) + after


EMPTY = {"stts": full("stts", 0), "stsc": full("stsc", 0), "stsz": full("stsz", 0, 0)}
ONE = {"stts": full("stts", 1, 1, 600), "stsc": full("stsc", 1, 1, 1, 1), "stsz": full("stsz", len(jpeg()), 1)}


def claim(count: int = MANY) -> dict[str, bytes]:
    """Tables of a few bytes that claim so many samples of one byte."""
    return {"stts": full("stts", 1, count, 1), "stsc": full("stsc", 1, 1, count, 1), "stsz": full("stsz", 1, count)}


def fragmented(*, truns: int = 1, count: int = MANY, moofs: int = 1) -> bytes:
    trex = box("mvex", full("trex", 1, 1, 1, 1, 0))
    traf = box("traf", full("tfhd", 1, flags=0x20000), *[full("trun", count)] * truns)
    moof = box("moof", full("mfhd", 1), traf)
    return mp4(table(**EMPTY), moov=trex, after=moof * moofs + box("mdat", jpeg()))


def compressed_header() -> bytes:
    """A QuickTime header whose packed form is a thousandth of what it unpacks to."""
    size = 1 << 30
    packer = zlib.compressobj(9)
    zeros = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    cmov = box("cmov", box("dcom", b"zlib"), box("cmvd", struct.pack(">I", size), zeros))
    return box("ftyp", b"qt  \0\0\2\0qt  ") + box("mdat", jpeg()) + box("moov", cmov)


def _number(value: int, length: int = 8) -> bytes:
    """A length as EBML writes it."""
    return (value | 1 << 7 * length).to_bytes(length, "big")


def element(code: int, *parts: bytes, claim: int | None = None) -> bytes:
    data = b"".join(parts)
    return code.to_bytes((code.bit_length() + 7) // 8, "big") + _number(len(data) if claim is None else claim) + data


def uint(code: int, value: int) -> bytes:
    return element(code, value.to_bytes(8, "big"))


def matroska(*parts: bytes, codec: bytes = b"V_MJPEG", private: bytes = b"", encoding: bytes = b"") -> bytes:
    video = element(0xE0, uint(0xB0, 16), uint(0xBA, 16))
    numbers = uint(0xD7, 1), uint(0x73C5, 1), uint(0x83, 1)
    entry = element(0xAE, *numbers, element(0x86, codec), video, element(0x63A2, private) if private else b"", encoding)
    head = element(0x1A45DFA3, element(0x4282, b"matroska"))
    info = element(0x1549A966, uint(0x2AD7B1, 1_000_000))
    return head + element(0x18538067, info, element(0x1654AE6B, entry), *parts)


def cluster(*blocks: bytes) -> bytes:
    simple = (element(0xA3, b"\x81\0\0\x80" + block) for block in blocks)
    return element(0x1F43B675, uint(0xE7, 0), *simple)


def cues(count: int) -> bytes:
    point = element(0xBB, uint(0xB3, 1), element(0xB7, uint(0xF7, 1), uint(0xF1, 100)))
    return matroska(element(0x1C53BB6B, *[point] * count), cluster(jpeg()))


def cue_positions(count: int) -> bytes:
    """Cue points that each list many positions."""
    position = b"\xb7\x83\xf1\x81\x01"
    point = element(0xBB, uint(0xB3, 1), *[position] * count)
    return matroska(element(0x1C53BB6B, point), cluster(jpeg()))


def attachments(count: int) -> bytes:
    """Pictures beside the video, each of which is a stream."""
    file = element(
        0x61A7, element(0x466E, b"a"), element(0x4660, b"image/jpeg"), element(0x465C, jpeg()), uint(0x46AE, 1)
    )
    return matroska(element(0x1941A469, file * count), cluster(jpeg()))


def subtitle_tracks(count: int) -> bytes:
    entries = (
        element(0xAE, uint(0xD7, n), uint(0x73C5, n), uint(0x83, 0x11), element(0x86, b"S_TEXT/UTF8"))
        for n in range(2, count + 2)
    )
    return matroska(element(0x1654AE6B, *entries), cluster(jpeg()))


def subtitles(count: int) -> bytes:
    """One frame, and then subtitles only."""
    track = element(0xAE, uint(0xD7, 2), uint(0x73C5, 2), uint(0x83, 0x11), element(0x86, b"S_TEXT/UTF8"))
    blocks = element(0xA3, b"\x82\0\0\x80a") * count
    return matroska(element(0x1654AE6B, track), cluster(jpeg()), element(0x1F43B675, uint(0xE7, 0), blocks))


def covers(count: int) -> bytes:
    """Cover pictures in an MP4's tags, each of which is a stream."""
    item = box("data", struct.pack(">II", 13, 0), jpeg())
    meta = full("meta", data=box("hdlr", bytes(8) + b"mdirappl" + bytes(9)) + box("ilst", box("covr", item * count)))
    return mp4(table(**ONE), moov=box("udta", meta))


def flac(picture: bytes, claimed: int) -> bytes:
    """Sound with a cover that claims more than it has."""
    info = struct.pack(">HH3s3sQ16s", 4096, 4096, bytes(3), bytes(3), 44100 << 44 | 1 << 41 | 15 << 36, bytes(16))
    fields = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 60000, 60000, 24, 0, claimed) + picture
    blocks = b"\0" + struct.pack(">I", len(info))[1:] + info, b"\x86" + struct.pack(">I", len(fields))[1:] + fields
    return b"fLaC" + b"".join(blocks)


def tags(count: int) -> bytes:
    return matroska(element(0x1254C367, *[element(0x7373, element(0x63C0))] * count), cluster(jpeg()))


def deflated_blocks() -> bytes:
    encoding = element(0x6D80, element(0x6240, uint(0x5033, 0), element(0x5034, uint(0x4254, 0))))
    packed = zlib.compress(jpeg() + bytes(9 << 20), 9)
    return matroska(*[cluster(*[packed] * 20)] * 4, encoding=encoding)


def grown(codec: str, container: str, small: int = 64, large: int = 6000) -> bytes:
    """A stream whose header gives the size of its first frame; the others are larger by far."""
    packets = []
    for side in (small, large, large, large):
        encoder = av.CodecContext.create(codec, "w")
        encoder.width = encoder.height = side
        encoder.pix_fmt, encoder.time_base = "yuvj420p" if codec == "mjpeg" else "yuv420p", Fraction(1, 5)
        if codec.startswith("libvpx"):
            encoder.options = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
        frame = av.VideoFrame.from_ndarray(np.full((side * 3 // 2, side), 128, np.uint8), "yuv420p")
        frame = frame.reformat(format=encoder.pix_fmt)
        frame.pts = 0
        packets.append(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec, rate=5)
        track.width = track.height = small
        track.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index, data in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = index
            packet.stream, packet.time_base, packet.is_keyframe = track, Fraction(1, 5), True
            output.mux(packet)
    return stream.getvalue()


def chunk(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def avi(*, index: bytes = b"", super_index: bytes = b"", movi: bytes = b"") -> bytes:
    avih = chunk(b"avih", struct.pack("<14I", 40000, 0, 0, 0x10, 1, 0, 1, 0, 16, 16, 0, 0, 0, 0))
    strh = chunk(b"strh", b"vidsMJPG", struct.pack("<10I4H", 0, 0, 0, 1, 25, 0, MANY, 0, 0, 0, 0, 0, 16, 16))
    strf = chunk(b"strf", struct.pack("<IiiHH4s5I", 40, 16, 16, 1, 24, b"MJPG", 768, 0, 0, 0, 0))
    header = chunk(b"LIST", b"hdrl", avih, chunk(b"LIST", b"strl", strh, strf, super_index))
    data = chunk(b"LIST", b"movi", movi or chunk(b"00dc", jpeg()))
    return chunk(b"RIFF", b"AVI ", header, data, index)


def avi_index(count: int) -> bytes:
    return avi(index=chunk(b"idx1", struct.pack("<4sIII", b"00dc", 16, 4, 1) * count))


def avi_super_index(parts: int, entries: int) -> bytes:
    """A list of indexes that are all the same one."""
    standard = struct.pack("<HBBI4sQI", 2, 0, 1, entries, b"00dc", 0, 0) + struct.pack("<II", 8, 1) * entries
    movi = chunk(b"ix00", standard) + chunk(b"00dc", jpeg())
    where = avi(super_index=chunk(b"indx", bytes(24 + 16 * parts)), movi=movi).index(b"ix00")
    listed = struct.pack("<HBBI4s12x", 4, 0, 0, parts, b"00dc") + struct.pack("<QII", where, len(standard), 1) * parts
    return avi(super_index=chunk(b"indx", listed), movi=movi)


def gif(count: int, side: int = 1) -> bytes:
    frame = b"\x2c\0\0\0\0" + struct.pack("<HHB", 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + frame * count + b";"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(size: int) -> bytes:
    """Packed zeros, without holding them."""
    packer = zlib.compressobj(9)
    step = 1 << 20
    return b"".join(packer.compress(bytes(min(step, size - at))) for at in range(0, size, step)) + packer.flush()


def png(width: int, height: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    picture = png_chunk(b"IDAT", zeros((width + 1) * height))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + picture + after + png_chunk(b"IEND", b"")


def apng(count: int, side: int = 16) -> bytes:
    data, parts = zlib.compress(bytes(2)), []
    for number in range(count):
        control = struct.pack(">IIIIIHHBB", 2 * number + 1, 1, 1, 0, 0, 1, 25, 0, 0)
        parts += [png_chunk(b"fcTL", control), png_chunk(b"fdAT", struct.pack(">I", 2 * number + 2) + data)]
    first = png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, side, side, 0, 0, 1, 25, 0, 0))
    return png(side, side, before=png_chunk(b"acTL", struct.pack(">II", count + 1, 0)) + first, after=b"".join(parts))


def webp(count: int, side: int = 16383) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "WEBP")
    body = stream.getvalue()[12:]
    size = (side - 1).to_bytes(3, "little")
    frame = chunk(b"ANMF", bytes(6), (15).to_bytes(3, "little") * 2, bytes(4), body)
    vp8x = chunk(b"VP8X", b"\x02\0\0\0", size, size)
    return chunk(b"RIFF", b"WEBP", vp8x, chunk(b"ANIM", bytes(6)), frame * count)


def crc32_mpeg(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


def transport_packet(pid: int, section: bytes) -> bytes:
    section += struct.pack(">I", crc32_mpeg(section))
    return struct.pack(">BHB", 0x47, 0x4000 | pid, 0x10) + b"\0" + section.ljust(183, b"\xff")


def mpegts(programs: int) -> bytes:
    """Many programs of many streams."""
    packets = []
    for program in range(1, programs + 1):
        pids = range(0x100, 0x100 + 30)
        entry = struct.pack(">HH", program, 0xE000 | 0x20)
        pat = struct.pack(">BHHBBB", 0, 0xB000 | (9 + len(entry)), 1, 0xC1, 0, 0) + entry
        streams = b"".join(struct.pack(">BHH", 0x1B, 0xE000 | (pid + 30 * program) % 0x1F00, 0xF000) for pid in pids)
        pmt = struct.pack(">BHHBBBHH", 2, 0xB000 | (13 + len(streams)), program, 0xC1, 0, 0, 0xE100, 0xF000) + streams
        packets += [transport_packet(0, pat), transport_packet(0x20, pmt)]
    return b"".join(packets)


def tiff(side: int) -> bytes:
    entries = [
        (256, 4, side),
        (257, 4, side),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 4, side),
        (279, 4, 8),
    ]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(entries)) + packed + bytes(4)


def tiff_pages(count: int) -> bytes:
    """Pages that lead back to the first."""
    page = tiff(16)[16:-4]
    pages = (page + struct.pack("<I", 16 + (n + 1) % count * (len(page) + 4)) for n in range(count))
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + b"".join(pages)


def playlist(depth: int) -> bytes:
    return b"ffconcat version 1.0\n" + b"file bomb.ffconcat\n" * depth


def hostile_media() -> dict[str, Callable[[], bytes]]:
    """What makes each file, by its name."""
    return {
        "samples.mp4": lambda: mp4(table(**claim())),
        "times.mp4": lambda: mp4(table(**ONE | {"stts": full("stts", 1 << 28, 1, 1)})),
        "offsets.mp4": lambda: mp4(table(**claim(), more=full("ctts", 1, MANY, 1))),
        "chunks.mp4": lambda: mp4(table(**ONE | {"stsc": full("stsc", 1 << 27, 1, 1, 1)})),
        "sizes.mp4": lambda: mp4(table(**ONE | {"stsz": full("stsz", 0, 1 << 28)})),
        "tracks.mp4": lambda: mp4(
            table(**claim(2**20)),
            tracks=300,
        ),
        "edits.mp4": lambda: mp4(table(**ONE), edits=box("edts", full("elst", MANY, 600, 0, 1 << 16))),
        "many-edits.mp4": lambda: mp4(
            table(**claim(2**18)),
            edits=box("edts", full("elst", 4000, *(600, 0, 1 << 16) * 4000)),
        ),
        "fragment.mp4": fragmented,
        "fragment-runs.mp4": lambda: fragmented(truns=500, count=1 << 20),
        "fragments.mp4": lambda: fragmented(moofs=2000, count=1 << 14),
        "packed-header.mov": compressed_header,
        "cues.mkv": lambda: cues(20_000),
        "cue-positions.mkv": lambda: cue_positions(200_000),
        "claimed.mkv": lambda: matroska(element(0xEC, claim=(1 << 56) - 2), cluster(jpeg())),
        "private.mkv": lambda: matroska(cluster(jpeg()), private=bytes(1 << 16)),
        "attachments.mkv": lambda: attachments(20_000),
        "subtitle-tracks.mkv": lambda: subtitle_tracks(10_000),
        "subtitles.mkv": lambda: subtitles(500_000),
        "covers.mp4": lambda: covers(20_000),
        "cover.flac": lambda: flac(png(11_000, 11_000), 1 << 31),
        "tags.mkv": lambda: tags(30_000),
        "packed-blocks.mkv": deflated_blocks,
        "grows-vp8.webm": lambda: grown("libvpx", "webm"),
        "grows-vp9.webm": lambda: grown("libvpx-vp9", "webm"),
        "grows-mjpeg.mkv": lambda: grown("mjpeg", "matroska"),
        "grows-mjpeg.avi": lambda: grown("mjpeg", "avi"),
        "grows-twelve.webm": lambda: grown("libvpx-vp9", "webm", large=11_000),
        "index.avi": lambda: avi_index(50_000),
        "indexes.avi": lambda: avi_super_index(4000, 4000),
        "frames.gif": lambda: gif(2_700_000),
        "canvas.gif": lambda: gif(20_000, side=11_000),
        "large.png": lambda: png(11_000, 11_000),
        "claimed.png": lambda: png(16, 16).replace(struct.pack(">II", 16, 16), struct.pack(">II", 1 << 30, 1 << 30), 1),
        "text.png": lambda: png(16, 16, before=png_chunk(b"zTXt", b"a\0\0" + zeros(1 << 30))),
        "profile.png": lambda: png(16, 16, before=png_chunk(b"iCCP", b"a\0\0" + zeros(1 << 30))),
        "frames.apng": lambda: apng(300_000),
        "canvas.apng": lambda: apng(3000, side=11_000),
        "canvas.webp": lambda: webp(100),
        "frames.webp": lambda: webp(50_000, side=16),
        "pages.tiff": lambda: tiff_pages(5000),
        "scans.jpg": lambda: jpeg(11_000, progressive=True, quality=1),
        "strips.tiff": lambda: tiff(1 << 20),
        "programs.ts": lambda: mpegts(1500),
        "bomb.ffconcat": lambda: playlist(1000),
    }
