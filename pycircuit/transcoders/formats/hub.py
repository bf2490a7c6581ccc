"""Where a set of transcoders lies: a local folder, or `org/repo[/path][@revision]` on the hub, from its cache if there."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[^@\x00]+)?(?:@[^\x00]+)?")


def locate(path: str | os.PathLike[str]) -> Path:
    """The folder, fetched first where it is a hub id that is not cached."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"load: path must be a folder, got the file {folder}; name the folder it is in")
    text = str(path)
    if not isinstance(path, str) or not _ID.fullmatch(text) or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"load: path must be a folder or a hub id org/repo[/path][@revision], got {text!r}")
    return _fetched(*split(text))


def split(text: str) -> tuple[str, str, str | None]:
    """(repository, path in it or "", revision) of a hub id."""
    where, _, revision = text.partition("@")
    parts = where.strip("/").split("/")
    if ".." in parts:
        raise ValueError(f"load: path must stay inside its repository, got {text!r}")
    return "/".join(parts[:2]), "/".join(parts[2:]), revision or None


def _fetched(repository: str, inner: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise ImportError(
            f"load: {repository!r} is no folder here, and fetching it from the hub needs huggingface_hub; "
            "pip install transformers"
        ) from None
    wanted = [f"{inner}/*"] if inner else None
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"load: path must be a folder or a hub id that can be reached or is cached, got {repository!r} "
            f"(revision {revision or 'main'}): {str(error).splitlines()[0]}"
        ) from None
    if not (folder / inner).is_dir():
        raise FileNotFoundError(f"load: {repository} must hold the folder {inner!r}, got none of that name")
    return folder / inner
