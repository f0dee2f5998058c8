"""Weights by name: a local folder, or a repository of the Hugging Face hub, fetched into the hub's own cache.

    USER/REPO                       the newest commit of its main branch
    USER/REPO@REVISION              a branch, a tag or a commit
    USER/REPO/FOLDER[@REVISION]     a part of it, such as one model of a bundle

A local folder of that name takes precedence. A name that begins with an existing folder, or with one of OUR_FOLDERS,
is a path unless it has an @REVISION: a mistyped or missing path must not be taken for somebody's repository.
Only files in formats that this package reads are fetched, none of which can run code. HF_ENDPOINT, HF_HUB_OFFLINE,
HF_HOME and HF_TOKEN work as in huggingface_hub.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORD = r"[A-Za-z0-9_][\w.-]*"
NAME = re.compile(rf"({WORD}/{WORD})((?:/{WORD})*)(?:@({WORD}(?:/{WORD})*))?", re.ASCII)
SNAPSHOT = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})(/.*)?$")
"""Matches a path in the hub's cache: user, repository, commit, and the path below them."""
SAFE_FILES = ("*.json", "*.safetensors", "*.npy", "*.yaml", "text.model")
"""Patterns of the files that are fetched: no pickles, no code."""
SAT_FILES = ("*latest", "*/mp_rank_*_model_states.pt")
"""Patterns for published checkpoints, besides SAFE_FILES. Their pickles are read by `torch_archive`, which runs none of
their code."""
OUR_FOLDERS = ("cogvideo", "configs", "data", "models", "runs", "samples", "videos", "weights")
"""Folders that the configs and the documentation read and write."""
WITHOUT_TRUNK = ("image_tokenizer", "text.model")
"""Parts of a bundle that need no trunk beside them."""


class HubName(NamedTuple):
    """A repository on the hub, or a part of it."""

    repo: str
    folder: str = ""
    """A folder or file in the repository; empty: all of it."""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """Parse a name; None for text that can only be a path."""
        match = NAME.fullmatch(text)
        return None if match is None else cls(match[1], match[2].removeprefix("/"), match[3])

    @property
    def looks_local(self) -> bool:
        user = self.repo.partition("/")[0]
        return self.revision is None and (user in OUR_FOLDERS or Path(user).is_dir())

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        return f"{self.repo}{folder}{f'@{self.revision}' if self.revision else ''}"

    def patterns(self, formats: Sequence[str] = SAFE_FILES) -> list[str]:
        """Patterns of the files to fetch. A bundle's model may be stored without its trunk, which is then beside it."""
        if not self.folder:
            return list(formats)
        parent, _, last = self.folder.rpartition("/")
        folders = [self.folder]
        if last not in WITHOUT_TRUNK:
            folders.append(f"{parent}/trunk".removeprefix("/"))
        own = [self.folder] if last == "text.model" else []
        return own + [f"{folder}/{pattern}" for folder in folders for pattern in formats]


def resolve(source: str | Path, formats: Sequence[str] = SAFE_FILES) -> Path:
    """The local folder or file of `source`, fetched from the hub if it names a repository and no local path.

    `formats`: patterns of the files to fetch.
    A path that does not exist and cannot be a repository's name is returned as it is.
    Raises: FileNotFoundError for a repository, revision or part that does not exist; OSError or ValueError, in one
    line, for anything else that keeps it from being fetched.
    """
    path, name = Path(source), HubName.parse(str(source))
    if name is None or path.exists() or name.looks_local:
        return path
    with _errors_in_one_line(name):
        from huggingface_hub import errors, hf_hub_download, snapshot_download

        patterns, revision = name.patterns(formats), name.revision
        with contextlib.suppress(errors.DryRunError):  # raised without a network; the cache may have the files
            # one by one, so that an interrupt need not wait for other threads
            for file in snapshot_download(name.repo, revision=revision, allow_patterns=patterns, dry_run=True):
                revision = file.commit_hash  # pinned, whatever is pushed meanwhile
                if file.will_download:
                    hf_hub_download(name.repo, file.filename, revision=file.commit_hash)
        snapshot = Path(snapshot_download(name.repo, revision=revision, allow_patterns=patterns))
    found = snapshot / name.folder
    if not found.exists():
        what = f"no {name.folder}" if name.folder else f"none of the files that are read here ({' '.join(formats)})"
        raise FileNotFoundError(f"{name}: commit {snapshot.name} has {what}; give another name")
    return found


def describe(path: str | Path) -> str:
    """How a path is recorded: USER/REPO[/FOLDER]@COMMIT if it was fetched from the hub, otherwise as it is."""
    match = SNAPSHOT.search(str(path))
    return str(path) if match is None else f"{match[1]}/{match[2]}{match[4] or ''}@{match[3]}"


def upload(repo: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Upload files, keyed by their names in the repository, in one commit; returns the commit's URL.

    The repository is created if it does not exist. Raises: ValueError if `repo` is not USER/REPO, is public although
    `private` is asked for, or holds other files; OSError or ValueError, in one line, for anything else that prevents
    the upload.
    """
    name = HubName.parse(repo)
    if name is None or name != HubName(repo):
        raise ValueError(f"{repo} is not a repository name; give USER/REPO")
    with _errors_in_one_line(name, uploading=True):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        if private and api.repo_exists(repo) and not api.repo_info(repo).private:
            raise ValueError(
                f"{repo} exists and is public, so a private upload would be published; make it private there, choose "
                "another name, or leave out --private"
            )
        api.create_repo(repo, private=private or None, exist_ok=True)
        others = sorted(set(api.list_repo_files(repo)) - {".gitattributes", "README.md", *files})
        if others:
            raise ValueError(
                f"{repo} holds {others[0]}, which is not part of this upload; remove it there, or choose another name"
            )
        additions = [
            CommitOperationAdd(there, here if isinstance(here, bytes) else str(here)) for there, here in files.items()
        ]
        for addition in additions:  # one by one, as in `resolve`
            api.preupload_lfs_files(repo, [addition])
        return str(api.create_commit(repo, additions, commit_message=message).commit_url)


@contextlib.contextmanager
def _errors_in_one_line(name: HubName, *, uploading: bool = False) -> Iterator[None]:
    """Turn errors of the hub into one line that says what went wrong and what to do."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        problem = "uploading to" if uploading else f"{name} is not a local folder, and fetching from"
        advice = "" if uploading else "give a folder, or "
        raise ValueError(
            f"{problem} the Hugging Face hub needs the extra [hub]; {advice}pip install 'cogvideo[hub]'"
        ) from None
    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(f"{name}: access is gated; request it at {hub}/{name.repo}") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name}: {hub}/{name.repo} has no revision {name.revision or 'main'}; give a branch, a tag or a commit"
        ) from None
    except errors.RepositoryNotFoundError:
        if uploading:
            raise PermissionError(
                f"{name}: {hub} does not let this account write there; `hf auth login` with a token that may write, or "
                "choose another name"
            ) from None
        raise FileNotFoundError(
            f"{name} is not a local folder, and {hub} has no such repository, or none that you can access; give "
            "another name, or `hf auth login` if it is private"
        ) from None
    except errors.LocalEntryNotFoundError:
        problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
        raise FileNotFoundError(
            f"{name} is not a local folder, is not complete in the hub's cache, and {problem}; give a folder, or fetch "
            "it once while online"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise ConnectionError(f"{name}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        rights = "write" if uploading else "read"
        token = f"`hf auth login`, or set HF_TOKEN to a token that may {rights} there"
        raise OSError(
            f"{name}: {hub} answered {status} ({_first_line(error)}); {token if status in (401, 403) else 'try again'}"
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{name} is not a repository name: {_first_line(error)}") from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # which wraps errors of large files
        if not _is_of_network(cause):
            raise
        raise ConnectionError(f"{name}: {hub} cannot be reached ({_first_line(cause)}); try again") from None


def _is_of_network(error: BaseException | None) -> bool:
    """Whether an error comes from the HTTP client; which client depends on huggingface_hub's version."""
    return any(base.__module__.partition(".")[0] in ("httpx", "httpx2") for base in type(error).__mro__)


def _first_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
