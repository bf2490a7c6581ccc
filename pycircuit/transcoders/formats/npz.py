"""NumPy archives: read in place where they are stored as they are, unpacked once into the cache where compressed.

An .npz is a zip of .npy files, each a short header and the numbers. Nothing in it is unpickled.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch

from pycircuit.files.safetensors import safetensors_header
from pycircuit.transcoders.resident_pages import State

from .cache import made_once
from .files import Stored, open_safetensors, reading

_KINDS = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}
_LOCAL = struct.Struct("<4s5H3L2H")  # what comes before a member's name
_BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error, zlib.error, OSError)
_KEPT = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes
_RATIO = 64  # unpacked over packed, above which it must be small
_SMALL = 64 << 20
_STEP = 1 << 20


def open_npz(path: Path) -> dict[str, Stored]:
    """Every array of an archive, by name."""
    with reading(path), path.open("rb") as file:
        state = State.of(os.fstat(file.fileno()))
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_sizes(path, members, state.size)
                found = {}
                for member in members:
                    if member.filename in found:
                        raise ValueError(f"load: {path} must hold each array once, got {member.filename} twice")
                    found[member.filename] = replace(_array(path, archive, member), state=state)
        except _BROKEN as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"load: {path} must be a whole .npz archive, got {said}; is it truncated?") from None
    if all(member.compress_type == zipfile.ZIP_STORED for member in members):
        return {stored.name: stored for stored in found.values()}
    return _unpacked(path, members, list(found.values()))


def _check_sizes(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    """Members may share their bytes, so that all together can be a bomb where each alone is none."""
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(_RATIO * size, _SMALL):
        raise ValueError(
            f"load: {path} must unpack to at most {_RATIO} times its size, got {size} bytes that say they are "
            f"{unpacked}; is it a bomb?"
        )


def _array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    """Of a compressed member the offset means nothing, the rest is known from its first bytes."""
    name = member.filename.removesuffix(".npy")
    if name == member.filename or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"load: {path} must hold .npy files and no folder, got {member.filename!r}")
    if member.compress_type not in _KEPT:
        raise ValueError(f"load: {path}: {name} must be stored or deflated, got zip's method {member.compress_type}")
    with archive.open(member) as file:
        shape, dtype, before = _header(path, name, file)
    with archive.open(member) as file:
        start = zlib.crc32(file.read(before))
    size = prod(shape) * dtype.itemsize
    if before + size != member.file_size:
        raise ValueError(f"load: {path}: {name} must be {before + size} bytes by its header, got {member.file_size}")
    begin, end = _data_begin(path, member) + before, path.stat().st_size
    if member.compress_type == zipfile.ZIP_STORED and begin + size > end:
        raise ValueError(f"load: {path}: {name} must end at byte {begin + size}, got {end} of them; is it truncated?")
    return replace(Stored.whole(path, name, begin, shape, dtype), checksum=(start, member.CRC))


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], torch.dtype, int]:
    """(shape, type, bytes before the numbers)."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, kind = read(file)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"load: {path}: {name} must be an array in NumPy's format, got {said}") from None
    if kind.hasobject:
        raise ValueError(f"load: {path}: {name} must hold numbers, got pickled objects, which could run anything")
    if kind.str not in _KINDS:
        raise TypeError(f"load: {path}: {name} must be one of {', '.join(_KINDS)}, got {kind.str}")
    if fortran and len(shape) > 1:
        raise ValueError(
            f"load: {path}: {name} must be stored row by row, got columns first; np.ascontiguousarray stores it so"
        )
    return tuple(int(n) for n in shape), _KINDS[kind.str], file.tell()


def _data_begin(path: Path, member: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(member.header_offset)
        fields = _LOCAL.unpack(file.read(_LOCAL.size))
    return int(member.header_offset + _LOCAL.size + fields[9] + fields[10])


def _unpacked(path: Path, members: list[zipfile.ZipInfo], arrays: list[Stored]) -> dict[str, Stored]:
    """The same arrays in a safetensors file of the cache, which is written once."""
    size = sum(member.file_size for member in members)
    kept = made_once("npz", [path], "", size, lambda fresh: _unpack(path, members, arrays, fresh))
    return open_safetensors(kept)


def _unpack(path: Path, members: list[zipfile.ZipInfo], arrays: list[Stored], fresh: Path) -> None:
    """zipfile checks each member's checksum as its end is read."""
    ordered = sorted(zip(arrays, members, strict=True), key=lambda pair: (-pair[0].dtype.itemsize, pair[0].name))
    text = safetensors_header({stored.name: (stored.dtype, stored.shape) for stored, _ in ordered})
    try:
        with path.open("rb") as packed, zipfile.ZipFile(packed) as archive, fresh.open("wb") as out:
            if arrays[0].state is not None:
                arrays[0].state.check(path, os.fstat(packed.fileno()))
            out.write(text)
            for stored, member in ordered:
                with archive.open(member) as file:
                    file.read(member.file_size - stored.bytes)
                    while block := file.read(_STEP):
                        out.write(block)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"load: {path} must be a whole .npz archive, got {said}; is it damaged?") from None
