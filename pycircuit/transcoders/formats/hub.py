"""Where transcoders lie: a local folder, or `org/repo[/path][@revision]` on the hub, from its cache if it can be."""

from __future__ import annotations

import glob
import os
import re
from itertools import permutations, product
from pathlib import Path
from urllib.parse import unquote

from .files import PICKLES

# What else lies in such repositories, often most of their bytes: pages about features, and pickles.
_NEVER_OPENED = ["features/*", "*/features/*", *(f"*{end}" for end in PICKLES)]
_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[^@\x00]+)?(?:@[^\x00]+)?")


def locate(path: str | os.PathLike[str], variant: str | None = None) -> Path:
    """The folder, fetched first where it is a hub id that is not cached; of several sets in it, `variant` alone."""
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
    return _fetched(*split(text), variant)


def split(text: str) -> tuple[str, str, str | None]:
    """(repository, path in it or "", revision) of a hub id."""
    where, _, revision = text.partition("@")
    parts = where.strip("/").split("/")
    if ".." in parts:
        raise ValueError(f"load: path must stay inside its repository, got {text!r}")
    return "/".join(parts[:2]), "/".join(parts[2:]), revision or None


def patterns(inner: str, variant: str | None) -> tuple[list[str] | None, list[str]]:
    """(names of which one must fit, or None for all; names that must not fit) of what is fetched.

    At least what `variants.chosen` leaves, and what says how to read it; published sets are too large to fetch all.
    """
    before, never = (f"{inner}/" if inner else ""), list(_NEVER_OPENED)
    parts = [part.strip() for part in variant.split(",")] if variant is not None else []
    wanted = [glob.escape(part) for part in parts if not part.startswith("not ")]
    for part in parts:
        if part.startswith("not "):
            name = glob.escape(part[4:].strip())
            never += [f"{a}{name}{b}*" for a, b in product((before, "*/", "*_", "*-", "*."), "/_-.")]
    if not wanted:
        return ([f"{before}*"] if inner else None), never
    weights = [f"{before}*{'*'.join(order)}*" for order in permutations(wanted[:4])]
    return [*weights, *(f"{before}*{end}" for end in (".yaml", ".json"))], never


def _fetched(repository: str, inner: str, revision: str | None, variant: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise _needs_hub(repository) from None
    wanted, never = patterns(inner, variant)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=never))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"load: path must be a folder or a hub id that can be reached or is cached, got {repository!r} "
            f"(revision {revision or 'main'}): {_line(error)}"
        ) from None
    if not (folder / inner).is_dir():
        raise FileNotFoundError(f"load: {repository} must hold the folder {inner!r}, got none of that name")
    return folder / inner


def fetched_file(uri: str) -> Path:
    """The file at hf://org/repo/path[?revision=...], or hf://org/repo@revision/path; what is quoted in a revision is
    unquoted."""
    where, _, query = uri.removeprefix("hf://").partition("?")
    options = dict(unquote(part).partition("=")[::2] for part in query.split("&")) if query else {}
    parts = where.split("/")
    if len(parts) < 3 or "" in parts or ".." in parts or set(options) - {"revision"}:
        raise ValueError(f"load: locations must be hf://org/repo/path?revision=..., got {uri!r}")
    name, _, given = parts[1].partition("@")
    repository, revision = f"{parts[0]}/{name}", options.get("revision") or given or None
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise _needs_hub(repository) from None
    try:
        return Path(hf_hub_download(repository, "/".join(parts[2:]), revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(f"load: {uri} must be reachable or cached, got {_line(error)}") from None


def _needs_hub(repository: str) -> ImportError:
    return ImportError(
        f"load: {repository!r} is no folder here, and fetching it from the hub needs huggingface_hub; "
        "pip install transformers"
    )


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
