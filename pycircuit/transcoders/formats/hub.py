"""Folders of transcoders: local, or `org/repo[/path][@revision]` on the hub, from its cache if it can be."""

from __future__ import annotations

import glob
import os
import re
from itertools import permutations, product
from pathlib import Path
from urllib.parse import unquote

from .stored_tensors import PICKLES

# Pages about features and pickles: often most of a repository's bytes.
_NEVER_OPENED = ["features/*", "*/features/*", *(f"*{end}" for end in PICKLES)]
_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[^@\x00]+)?(?:@[^\x00]+)?")


def local_folder(path: str | os.PathLike[str], variant: str | None = None) -> Path:
    """Return the folder, downloaded first for a hub id that is not cached; of several sets in it, `variant` alone."""
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise TypeError(f"load: path must be a folder or a hub id org/repo[/path][@revision], got {kind}")
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"load: path must be a folder, got the file {folder}; name the folder it is in")
    text = str(path)
    if not isinstance(path, str) or not _ID.fullmatch(text) or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"load: path must be a folder or a hub id org/repo[/path][@revision], got {text!r}")
    return _download(*split_id(text), variant)


def split_id(text: str) -> tuple[str, str, str | None]:
    """Repository, path in it or "", and revision of a hub id."""
    location, _, revision = text.partition("@")
    names = location.strip("/").split("/")
    if ".." in names:
        raise ValueError(f"load: path must stay inside its repository, got {text!r}")
    return "/".join(names[:2]), "/".join(names[2:]), revision or None


def download_patterns(inner: str, variant: str | None) -> tuple[list[str] | None, list[str]]:
    """Patterns of files to download, or None for all, and patterns of files to leave out.

    They cover at least the files that `select.matching` leaves, and configurations; a published set is too large to
    download with all others beside it.
    """
    prefix = f"{inner}/" if inner else ""
    excluded = list(_NEVER_OPENED)
    terms = [term.strip() for term in variant.split(",")] if variant is not None else []
    wanted = [glob.escape(term) for term in terms if not term.startswith("not ")]
    for term in terms:
        if term.startswith("not "):
            name = glob.escape(term[4:].strip())
            excluded += [f"{a}{name}{b}*" for a, b in product((prefix, "*/", "*_", "*-", "*."), "/_-.")]
    if not wanted:
        return ([f"{prefix}*"] if inner else None), excluded
    weights = [f"{prefix}*{'*'.join(order)}*" for order in permutations(wanted[:4])]
    return [*weights, *(f"{prefix}*{end}" for end in (".yaml", ".json"))], excluded


def _download(repository: str, inner: str, revision: str | None, variant: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise _needs_hub(repository) from None
    wanted, excluded = download_patterns(inner, variant)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=excluded))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"load: path must be a folder or a hub id that can be reached or is cached, got {repository!r} "
            f"(revision {revision or 'main'}): {_first_line(error)}"
        ) from None
    if not (folder / inner).is_dir():
        raise FileNotFoundError(f"load: {repository} must hold the folder {inner!r}, got none of that name")
    return folder / inner


def fetched_file(uri: str) -> Path:
    """Return the file at hf://org/repo/path[?revision=...], or hf://org/repo@revision/path; revisions are unquoted."""
    location, _, query = uri.removeprefix("hf://").partition("?")
    options = dict(unquote(option).partition("=")[::2] for option in query.split("&")) if query else {}
    names = location.split("/")
    if len(names) < 3 or "" in names or ".." in names or set(options) - {"revision"}:
        raise ValueError(f"load: locations must be hf://org/repo/path?revision=..., got {uri!r}")
    name, _, name_revision = names[1].partition("@")
    repository, revision = f"{names[0]}/{name}", options.get("revision") or name_revision or None
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise _needs_hub(repository) from None
    try:
        return Path(hf_hub_download(repository, "/".join(names[2:]), revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(f"load: {uri} must be reachable or cached, got {_first_line(error)}") from None


def _needs_hub(repository: str) -> ImportError:
    return ImportError(
        f"load: {repository!r} is no folder here, and fetching it from the hub needs huggingface_hub; "
        "pip install transformers"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
