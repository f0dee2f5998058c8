"""Weights by name: local folders, repositories of a stand-in hub, their cache, and what can go wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest

from cogvideo.hub import HubName, describe, resolve, upload
from tests.helpers.hub import Hub, log_in


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("someone/clips", HubName("someone/clips")),
        ("someone/clips@v1", HubName("someone/clips", "", "v1")),
        ("some-one/clips.2/trunk@refs/pr/1", HubName("some-one/clips.2", "trunk", "refs/pr/1")),
        ("someone/clips/text.model", HubName("someone/clips", "text.model")),
        *[
            (text, None)
            for text in ("clips", "/someone/clips", "./a/b", "../a/b", "a/../b", "a//b", "a/b@", "a/b c", "")
        ],
    ],
)
def test_names_of_repositories(text: str, expected: HubName | None) -> None:
    assert HubName.parse(text) == expected
    assert expected is None or str(expected) == text


def test_a_local_folder_wins(hub: Hub) -> None:
    hub.commit("someone/clips", {"config.json": b"{}"})
    Path("someone/clips").mkdir(parents=True)
    assert resolve("someone/clips") == Path("someone/clips")
    assert hub.requests == []


def test_mistyped_and_missing_paths_are_not_asked_for(hub: Hub) -> None:
    Path("mine").mkdir()
    for path in ("mine/absent", "runs/absent", "runs/own/text.model"):  # there is no folder runs
        assert resolve(path) == Path(path)
    assert resolve("/absent/clips") == Path("/absent/clips")
    assert hub.requests == []
    commit = hub.commit("runs/absent", {"config.json": b"{}"})
    assert describe(resolve("runs/absent@main")) == f"runs/absent@{commit}"


def test_revisions_and_what_they_are_recorded_as(hub: Hub) -> None:
    first = hub.commit("someone/clips", {"config.json": b"1"}, "v1")
    second = hub.commit("someone/clips", {"config.json": b"2"})
    for name, commit, content in (
        ("someone/clips", second, "2"),
        ("someone/clips@v1", first, "1"),
        (f"someone/clips@{first}", first, "1"),
    ):
        folder = resolve(name)
        assert (folder / "config.json").read_text() == content
        assert describe(folder) == f"someone/clips@{commit}"
        assert describe(folder / "config.json") == f"someone/clips/config.json@{commit}"
        assert resolve(describe(folder)) == folder
    assert describe("runs/mine") == "runs/mine"


def test_a_push_during_a_download_does_not_change_what_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    first, download = hub.commit("someone/clips", {"config.json": b"1"}), huggingface_hub.hf_hub_download

    def push_and_download(*args: Any, **options: Any) -> str:
        hub.commit("someone/clips", {"config.json": b"2"})
        return str(download(*args, **options))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", push_and_download)
    folder = resolve("someone/clips")
    assert describe(folder) == f"someone/clips@{first}" and (folder / "config.json").read_text() == "1"
    assert len(hub.downloads) == 1


def test_only_safe_files_are_fetched(hub: Hub) -> None:
    safe = ["clusters.npy", "sampling.yaml", "text.model", "trunk/config.json", "trunk/model.safetensors"]
    unsafe = ["model.pt", "pytorch_model.bin", "code.py", "x.pkl", "README.md", "trunk/weights.pth"]
    hub.commit("someone/clips", {name: name.encode() for name in (*safe, *unsafe)})
    folder = resolve("someone/clips")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == safe
    assert hub.downloads == safe


def test_parts_are_fetched_alone_and_models_with_their_trunk(hub: Hub) -> None:
    files = [f"{name}/config.json" for name in ("trunk", "sequential", "interpolation", "image_tokenizer")]
    hub.commit("someone/clips", {name: name.encode() for name in (*files, "text.model")})
    assert (resolve("someone/clips/image_tokenizer") / "config.json").is_file()
    assert resolve("someone/clips/text.model").is_file()
    assert hub.downloads == ["image_tokenizer/config.json", "text.model"]
    assert (resolve("someone/clips/sequential@main") / "../trunk/config.json").is_file()
    assert hub.downloads == ["image_tokenizer/config.json", "sequential/config.json", "text.model", "trunk/config.json"]


def test_the_cache_serves_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.commit("someone/clips", {"config.json": b"1"})
    folder = resolve("someone/clips")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("someone/clips") == folder
    with pytest.raises(FileNotFoundError, match=r"someone/other .*HF_HUB_OFFLINE is set") as error:
        resolve("someone/other")
    one_line(error)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set") as offline:
        upload("someone/clips", {"config.json": b"2"}, private=False, message="m")
    one_line(offline)
    assert hub.requests == []


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.commit("someone/clips", {"config.json": b"1"})
    folder = resolve("someone/clips")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("someone/clips") == folder
    with pytest.raises(FileNotFoundError, match=r"someone/other .*http://127.0.0.1:9 cannot be reached") as error:
        resolve("someone/other")
    one_line(error)


def test_what_does_not_exist(hub: Hub) -> None:
    hub.commit("someone/clips", {"config.json": b"{}"})
    hub.commit("someone/pickles", {"model.pt": b"x"})
    hub.commit("someone/secret", {"config.json": b"{}"})
    hub.private.add("someone/secret")
    for name, message in {
        "someone/absent": "someone/absent is not a local folder, and .* has no such repository",
        "someone/secret": "`hf auth login` if it is private",
        "someone/clips@v9": r"has no revision v9; give a branch, a tag or a commit",
        f"someone/clips@{40 * 'a'}": "has no revision",
        "someone/clips/trunk": "commit [0-9a-f]{40} has no trunk",
        "someone/pickles": r"has none of the files that are read here \(\*.json",
    }.items():
        with pytest.raises(FileNotFoundError, match=message) as error:
            resolve(name)
        one_line(error)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"someone/clips .* pip install 'cogvideo\[hub\]'") as error:
        resolve("someone/clips")
    one_line(error)
    with pytest.raises(ValueError, match=r"^uploading to .* pip install 'cogvideo\[hub\]'"):
        upload("someone/clips", {}, private=False, message="m")


def test_uploads_are_one_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch)
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 40)
    url = upload("someone/clips", {"model.safetensors": large, "README.md": b"# Clips"}, private=True, message="m")
    assert url.startswith(f"{hub.url}/someone/clips/commit/")
    assert hub.newest("someone/clips") == {
        ".gitattributes": b"",
        "model.safetensors": large.read_bytes(),
        "README.md": b"# Clips",
    }
    assert "someone/clips" in hub.private
    assert len(hub.repositories["someone/clips"]) == 2


def test_a_private_upload_to_a_public_repository_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch)
    for repo in ("someone/public", "someone/secret"):
        hub.commit(repo, {"README.md": b""})
    hub.private.add("someone/secret")
    with pytest.raises(ValueError, match=r"someone/public exists and is public") as error:
        upload("someone/public", {"config.json": b"2"}, private=True, message="m")
    one_line(error)
    assert not [request for request in hub.requests if request.startswith(("POST", "PUT"))]
    upload("someone/secret", {"config.json": b"2"}, private=True, message="m")
    assert "config.json" in hub.newest("someone/secret") and "config.json" not in hub.newest("someone/public")


def test_an_upload_to_a_repository_of_others(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    hub.commit("someone/secret", {"config.json": b"1"})
    hub.private.add("someone/secret")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    with pytest.raises(PermissionError, match=r"someone/secret: .* does not let this account write there") as error:
        upload("someone/secret", {"config.json": b"2"}, private=False, message="m")
    assert "local folder" not in one_line(error)


def test_uploads_that_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        OSError, match=r"answered 401 .*; `hf auth login`, or set HF_TOKEN to a token that may write"
    ) as error:
        upload("someone/clips", {"config.json": b"2"}, private=False, message="m")
    one_line(error)
    log_in(monkeypatch)
    hub.commit("someone/other", {"pytorch_model.bin": b"x", "README.md": b""})
    with pytest.raises(ValueError, match=r"holds pytorch_model.bin, which is not part of this upload"):
        upload("someone/other", {"config.json": b"2"}, private=False, message="m")
    assert hub.newest("someone/other").keys() == {"pytorch_model.bin", "README.md"}
    for name in ("clips", "someone/clips/trunk", "someone/clips@v1", "/a/b", "a/b/../c"):
        with pytest.raises(ValueError, match="give USER/REPO"):
            upload(name, {}, private=False, message="m")
