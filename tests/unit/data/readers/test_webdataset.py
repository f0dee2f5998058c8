"""WebDataset tars: samples, videos read in place, several tars, members that are refused, damage."""

import io
import json
import tarfile

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import ReadOptions, open_captions


def write(path, *members, format=tarfile.PAX_FORMAT):
    """A tar of (name, content) or of TarInfo without content."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_and_the_bytes_of_their_videos(tmp_path, format):
    long = f"{'long' * 12}/{'é' * 40}"
    file = write(
        tmp_path / "s.tar",
        ("000.json", json.dumps({"caption": "no", "width": 8}).encode()),
        ("000.mp4", b"zero"),
        ("000.txt", b"a dog"),
        ("./001.mp4", b"one"),
        ("./001.json", json.dumps({"text": ["x", "y"], "start": 2}).encode()),
        (f"{long}.mp4", b"two"),
        (f"{long}.txt", b"far"),
        ("readme.md", b"ignored"),
        format=format,
    )
    captions = open_captions(file)
    expected = [
        Caption("s.tar/000.mp4", "a dog", extra={"caption": "no", "width": 8}),
        Caption("s.tar/001.mp4", "x", 2.0),
        Caption("s.tar/001.mp4", "y", 2.0),
        Caption(f"s.tar/{long}.mp4", "far"),
    ]
    assert list(captions) == expected and captions.select([3, 0]) == [expected[3], expected[0]]
    for index, content in {0: b"zero", 2: b"one", 3: b"two"}.items():
        source = captions.select([index])[0].source
        assert str(source) == expected[index].video
        assert file.read_bytes()[source.start : source.start + source.size] == content


def test_braces_and_folders_of_tars(tmp_path):
    for number in range(8, 11):
        write(tmp_path / f"s-{number:03d}.tar", ("a.mp4", b"v"), ("a.txt", str(number).encode()))
    for path in (tmp_path / "s-{008..010}.tar", tmp_path):
        captions = open_captions(path)
        assert [(caption.video, caption.text) for caption in captions] == [
            (f"s-{number:03d}.tar/a.mp4", str(number)) for number in range(8, 11)
        ]
    with pytest.raises(FileNotFoundError, match=r"s-011\.tar"):
        open_captions(tmp_path / "s-{008..011}.tar")
    with pytest.raises(ValueError, match="expected a range such as"):
        open_captions(tmp_path / "s-{9..1}.tar")


def test_tars_in_several_folders(tmp_path):
    tars = [f"p{part}/s{number}.tar" for part in range(2) for number in (9, 10)]
    for tar in tars:
        (tmp_path / tar).parent.mkdir(exist_ok=True)
        write(tmp_path / tar, ("a.mp4", b"v"), ("a.txt", b"x"))
    captions = open_captions(tmp_path / "p{0..1}" / "s{9..10}.tar")
    assert [caption.video for caption in captions] == [f"{tar}/a.mp4" for tar in tars]


GOOD = [("z.mp4", b"v"), ("z.txt", b"fine")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../a.mp4", b"v"), ("../a.txt", b"x")], "leads out of the tar"),
        ([("/a.mp4", b"v"), ("/a.txt", b"x")], "leads out of the tar"),
        ([special("a.mp4", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", b"x")], "a.mp4 is a link to '/etc/passwd'"),
        ([special("a.mp4", tarfile.LNKTYPE, "b.mp4"), ("a.txt", b"x")], "a.mp4 is a link to 'b.mp4'"),
        ([special("a.mp4", tarfile.FIFOTYPE), ("a.txt", b"x")], "a.mp4 is not a plain file"),
        ([special("a.mp4", tarfile.GNUTYPE_SPARSE), ("a.txt", b"x")], "stored sparsely"),
        ([("a.mp4", b"v"), ("a.txt", b"x" * (1 << 21))], "expected at most 1048576"),
        ([("a.mp4", b"v"), ("a.txt", b"\xff")], "a.txt: not UTF-8 text"),
        ([("a.mp4", b"v"), ("a.json", b"{")], "its .json is not JSON"),
        ([("a.mp4", b"v")], "no caption beside it"),
        ([("a.txt", b"x")], "no video for this caption; members with the same key must be adjacent"),
        ([("a.mp4", b"v"), ("a.webm", b"v"), ("a.txt", b"x")], "expected one video and at most one text of each kind"),
        ([*GOOD[:1], *GOOD, ("b.md", b"")], "expected one video"),
        ([*GOOD, ("b.md", b""), *GOOD], "duplicate key 'z'"),
    ],
)
def test_a_sample_that_cannot_be_used_is_skipped(tmp_path, members, reason):
    captions = open_captions(
        write(tmp_path / "s.tar", *members, ("y.md", b""), ("good.mp4", b"v"), ("good.txt", b"g")), skip_bad=True
    )
    assert captions.select([len(captions) - 1])[0].text == "g"
    assert len(captions.bad) == 1 and reason in captions.bad[0].reason


def test_a_tar_that_is_cut_short_gives_the_samples_before(tmp_path):
    file = write(tmp_path / "s.tar", ("a.mp4", b"v"), ("a.txt", b"x"), ("b.txt", b"y"), ("b.mp4", b"v" * 5000))
    file.write_bytes(file.read_bytes()[:4000])
    captions = open_captions(file, skip_bad=True)
    assert [caption.text for caption in captions] == ["x"] and captions.select([0])[0].text == "x"
    assert "no video for" in captions.bad[0].reason and "damaged" in captions.bad[1].reason


@pytest.mark.parametrize("after", [b"x" * 512, b"\0" * 1024 + b"x" * 512])
def test_what_follows_a_wrong_header_is_not_lost_silently(tmp_path, after):
    file = write(tmp_path / "s.tar", *GOOD)
    file.write_bytes(file.read_bytes()[:2048] + after)
    captions = open_captions(file, skip_bad=True)
    assert len(captions) == 1 and "damaged, the samples from here on are lost" in captions.bad_reasons()[0]


def test_a_header_of_a_huge_size_is_not_read(tmp_path):
    info = tarfile.TarInfo("a.mp4")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    with pytest.raises(ValueError, match=r"damaged.*a header of"):
        open_captions(tmp_path / "s.tar")


def with_attributes(name, attributes):
    info = tarfile.TarInfo(name)
    info.pax_headers = attributes
    return info


@pytest.mark.parametrize(
    "attributes",
    [
        {"GNU.sparse.map": "x"},
        {"GNU.sparse.size": "x"},
        {"GNU.sparse.realsize": "9" * 5000},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"size": "9" * 4000},
    ],
)
def test_attributes_that_are_no_numbers_are_damage_of_their_tar(tmp_path, attributes):
    write(tmp_path / "s.tar", ("0.mp4", b"0"), ("0.txt", b"x"), with_attributes("1.mp4", attributes))
    captions = open_captions(tmp_path / "s.tar", skip_bad=True)
    assert len(captions) == 1 and "damaged, the samples from here on are lost" in captions.bad[0].reason
    assert captions.select([0])[0].text == "x"


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_of_headers_are_damage_of_their_tar(tmp_path, kind):
    good = write(tmp_path / "s.tar", ("0.mp4", b"0"), ("0.txt", b"x")).read_bytes()[:2048]
    (tmp_path / "s.tar").write_bytes(good + special("x", kind).tobuf(tarfile.USTAR_FORMAT) * 3000 + bytes(1024))
    captions = open_captions(tmp_path / "s.tar", skip_bad=True)
    assert len(captions) == 1 and "damaged, the samples from here on are lost" in captions.bad[0].reason


def test_sparse_headers_that_end_early_are_damage_of_their_tar(tmp_path):
    header = bytearray(special("1.mp4", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # more headers follow
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    good = write(tmp_path / "s.tar", ("0.mp4", b"0"), ("0.txt", b"x")).read_bytes()[:2048]
    (tmp_path / "s.tar").write_bytes(good + header)
    captions = open_captions(tmp_path / "s.tar", skip_bad=True)
    assert len(captions) == 1 and "damaged, the samples from here on are lost" in captions.bad[0].reason
    (tmp_path / "s.tar").write_bytes(header)
    with pytest.raises(ValueError, match=r"s\.tar byte 512: damaged"):
        open_captions(tmp_path / "s.tar", skip_bad=True)


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\0" * 1024])
def test_no_tar(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.tar.*(damaged|no captions)"):
        open_captions(tmp_path / "s.tar")


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="is compressed; decompress it"):
        open_captions(tmp_path / "s.tar.gz", ReadOptions())


@pytest.mark.parametrize("suffixes", [(".mp4", ".txt"), (".json", ".mp4"), (".txt", ".mp4"), (".cls", ".mp4", ".txt")])
def test_names_with_dots_of_their_own(tmp_path, suffixes):
    names = ["v1.000", "v1.001", "v1.002", "v2.000"]
    members = []
    for name in names:
        for suffix in suffixes:
            text = json.dumps({"caption": name}) if suffix == ".json" else name
            members.append((name + suffix, text.encode()))
    captions = open_captions(write(tmp_path / "s.tar", *members))
    expected = [Caption(f"s.tar/{name}.mp4", name) for name in names]
    assert list(captions) == expected and captions.select([2, 1, 3]) == [expected[2], expected[1], expected[3]]


def test_what_follows_the_first_dot_is_a_kind_where_one_video_has_the_key(tmp_path):
    members = [("a.en.txt", b"x"), ("a.meta.json", b"{}"), ("a.mp4", b"v"), ("b.mp4", b"v"), ("b.en.txt", b"y")]
    captions = open_captions(write(tmp_path / "s.tar", *members))
    assert [(caption.video, caption.text) for caption in captions] == [("s.tar/a.mp4", "x"), ("s.tar/b.mp4", "y")]


def test_videos_with_dots_and_without_texts(tmp_path):
    members = [("v.0.mp4", b"v"), ("v.1.txt", b"x"), ("v.1.mp4", b"v"), ("v.2.mp4", b"v")]
    captions = open_captions(write(tmp_path / "s.tar", *members), skip_bad=True)
    assert list(captions) == [Caption("s.tar/v.1.mp4", "x")]
    assert [record.place for record in captions.bad] == ["s.tar v.0", "s.tar v.2"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("given", [None, "cp1252"])
def test_texts_with_a_byte_order_mark(tmp_path, encoding, given):
    members = [("a.mp4", b"v"), ("a.txt", "café".encode(encoding))]
    members += [("b.mp4", b"v"), ("b.json", '{"caption": "两个圆"}'.encode(encoding))]
    captions = open_captions(write(tmp_path / "s.tar", *members), ReadOptions(encoding=given))
    assert [caption.text for caption in captions] == ["café", "两个圆"]


def test_a_text_in_another_encoding_is_named_with_the_remedy(tmp_path):
    members = [("a.mp4", b"v"), ("a.txt", "un café très élégant".encode("cp1252"))]
    with pytest.raises(
        ValueError, match=r"a\.txt: not UTF-8 text, probably cp1252 \(Windows\); give --encoding cp1252"
    ):
        open_captions(write(tmp_path / "s.tar", *members))
    captions = open_captions(tmp_path / "s.tar", ReadOptions(encoding="cp1252"))
    assert next(iter(captions)).text == "un café très élégant"


@pytest.mark.parametrize("other", ["metadata.csv", "part/a.mp4"])
def test_a_tar_among_videos_is_not_taken_for_the_data_set(tmp_path, other):
    write(tmp_path / "backup.tar", ("old.mp4", b"v"), ("old.txt", b"x"))
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("file_name,text\nb.mp4,x\n")
    with pytest.raises(ValueError, match=rf"holds tars \(backup\.tar\) and {other}; .* by name$") as caught:
        open_captions(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(open_captions(tmp_path / "backup.tar")) == 1
