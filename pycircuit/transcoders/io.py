"""Transcoders on disk: loaded from any format, saved, converted and inspected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pycircuit.files.atomic_folder import new_folder
from pycircuit.files.reading import reword_os_errors
from pycircuit.files.sizes import parse_bytes

from .formats import hooks, saving
from .formats.contents import MOST_LAYERS, Contents, check_shapes
from .formats.detect import Recognised, recognise
from .formats.hooks import ReadSite, Stream, WriteSite
from .formats.reader import read_transcoders
from .formats.report import Report, report
from .formats.select import Overrides
from .types import READS, WRITES, Transcoders

CACHE_BYTES = 4 << 30  # of decoder rows, unless `load` says otherwise
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    layers: int | None = None,
    variant: str | None = None,
    reads: ReadSite | None = None,
    writes: WriteSite | None = None,
    cache: int | str = CACHE_BYTES,
) -> Transcoders:
    """Return the transcoders of a local folder or a hub id `org/repo[/path][@revision]`, of any format in `FORMATS`.

    dtype: what they are converted to as they are read; None: as they are stored. lazy: decoders stay in their files,
    and the rows of a prompt's active features are read when they are needed; `cache` bytes of them are kept.
    layers: the model's number of layers, where some may have no transcoder; without it a missing layer is an error.
    variant: parts of a path, with commas, that say which of several sets is meant: "16k, small, not affine". reads,
    writes: as of pc.PerLayerTranscoders, or the name of a hook, where the files do not say it or are wrong.
    """
    _check_dtype("load", dtype)
    cache_bytes = parse_bytes(cache, "load: cache", least=0)
    device = parse_device(device)
    _, contents = _contents(path, _overrides(layers, variant, reads, writes))
    return read_transcoders(contents, device, dtype, lazy, cache_bytes)


def _contents(path: str | os.PathLike[str], overrides: Overrides) -> tuple[Recognised, Contents]:
    """The format of a folder, and the contents of its files."""
    recognised = recognise(path, overrides.variant)
    with reword_os_errors(recognised.path):
        contents = recognised.format.read(recognised.path, overrides)
    if overrides.layers not in (None, len(contents.layers)):
        got = f"{overrides.layers}, and {len(contents.layers)} in {recognised.path}"
        raise ValueError(f"load: layers must be the number that the files are for, got {got}")
    check_shapes(contents)
    return recognised, contents


def _check_dtype(op: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _FLOATS:
        got = dtype if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(f"{op}: dtype must be float64, float32, bfloat16 or float16 of torch, got {got}")


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return a device by its name; None: the CPU."""
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"load: device must be such as 'cpu' or 'cuda:0', got {device!r}: {error}") from None


def _overrides(layers: int | None, variant: str | None, reads: ReadSite | None, writes: WriteSite | None) -> Overrides:
    if layers is not None and (type(layers) is not int or not 1 <= layers <= MOST_LAYERS):
        raise ValueError(f"load: layers must be a whole number of at least 1 and at most {MOST_LAYERS}, got {layers!r}")
    if not isinstance(variant, str | None):
        raise TypeError(f"load: variant must be parts of a path, with commas, got {variant!r}")
    return Overrides(
        layers,
        variant,
        _stream("reads", reads, hooks.READS, READS),
        _stream("writes", writes, hooks.WRITES, WRITES),
    )


def _stream(
    name: str, site: str | None, hook_streams: Mapping[Any, Stream], streams: Sequence[Stream]
) -> Stream | None:
    """The stream of this name, or of a hook with this name."""
    if site is None:
        return None
    stream = hook_streams.get(hooks.without_layer(site), site)
    if stream not in streams:
        raise ValueError(f"load: {name} must be one of {', '.join(streams)}, or a hook's name, got {site!r}")
    return streams[streams.index(stream)]


def save(
    transcoders: Transcoders, path: str | os.PathLike[str], model: str | None = None, scan: str | None = None
) -> Path:
    """Write transcoders to a new folder that circuit-tracer and `load` read. model: the name of their model.

    Readers see the complete folder or none. scan: where their features are described; the folder's name if None.
    """
    if not isinstance(transcoders, Transcoders):
        kind = type(transcoders).__name__
        raise TypeError(f"save: transcoders must be pc.PerLayerTranscoders or pc.CrossLayerTranscoder, got {kind}")
    folder = new_folder("save", path)
    saving.write("save", saving.set_in_memory(transcoders), folder, "pycircuit", model, scan, None)
    return folder


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "circuit-tracer",
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    variant: str | None = None,
    reads: ReadSite | None = None,
    writes: WriteSite | None = None,
) -> Path:
    """Write transcoders of any format to a new folder, a layer at a time; arguments as of `load`.

    to: "circuit-tracer" or "pycircuit", which are the same files, or "saelens". The numbers stay as they are unless
    dtype says otherwise. After a failure or a kill the same call goes on with the files that are left to write.
    """
    if to not in saving.LAYOUTS:
        raise ValueError(f"convert: to must be one of {', '.join(saving.LAYOUTS)}, got {to!r}")
    _check_dtype("convert", dtype)
    folder = new_folder("convert", target)
    _, contents = _contents(source, _overrides(layers, variant, reads, writes))
    key = _resume_key(contents, to, dtype)
    saving.write("convert", saving.set_in_files(contents, dtype), folder, to, contents.model, None, key)
    return folder


def _resume_key(contents: Contents, to: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """All that decides what a conversion writes: a broken run is gone on with if it began with the same."""
    paths = sorted({t.path for layer in contents.layers for t in layer.stored().values()})
    states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    arguments = [version("pycircuit"), to, str(dtype), contents.cross, contents.reads, contents.writes]
    fingerprints = [layer.fingerprint() for layer in contents.layers]
    return {"files": states, "arguments": arguments, "layers": fingerprints}


def inspect(
    path: str | os.PathLike[str],
    weights: bool = True,
    layers: int | None = None,
    variant: str | None = None,
    reads: ReadSite | None = None,
    writes: WriteSite | None = None,
) -> Report:
    """Return a report of a folder or hub id, as `load` would take it; print it, or call its .json().

    weights: read all of them too and warn of NaN, dead and repeated features; without it only headers are read.
    """
    recognised, contents = _contents(path, _overrides(layers, variant, reads, writes))
    return report(recognised.format.name, recognised.evidence, contents, weights)
