"""NumPy archives: read in place where they are uncompressed, unpacked once into the cache folder otherwise.

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
from typing import IO, BinaryIO

import numpy as np
import torch

from pycircuit.files.cache_folder import cached_file
from pycircuit.files.reading import FileState, reading
from pycircuit.files.safetensors import safetensors_header

from .stored_tensors import StoredTensor, open_safetensors

_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # precedes a member's name
_BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error, zlib.error, OSError)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes
_MOST_RATIO = 64  # unpacked over packed, above which it must be small
_SMALL_BYTES = 64 << 20
_STEP = 1 << 20


def open_npz(path: Path) -> dict[str, StoredTensor]:
    """Every array of an archive, by name."""
    with reading(path), path.open("rb") as file:
        state = FileState.of(os.fstat(file.fileno()))
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_sizes(path, members, state.size)
                arrays: dict[str, StoredTensor] = {}
                for member in members:
                    if member.filename in arrays:
                        raise ValueError(f"load: {path} must hold each array once, got {member.filename} twice")
                    arrays[member.filename] = replace(_array(path, archive, member), state=state)
        except _BROKEN as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"load: {path} must be a whole .npz archive, got {reason}; is it truncated?") from None
    if all(member.compress_type == zipfile.ZIP_STORED for member in members):
        return {stored.name: stored for stored in arrays.values()}
    return _unpacked(path, members, list(arrays.values()))


def _check_sizes(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    """Raise an error if all members together are a bomb: they may share their bytes, and each alone be none."""
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(_MOST_RATIO * size, _SMALL_BYTES):
        raise ValueError(
            f"load: {path} must unpack to at most {_MOST_RATIO} times its size, got {size} bytes that say they are "
            f"{unpacked}; is it a bomb?"
        )


def _array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> StoredTensor:
    """The array of a member, by its first bytes; the offset of a compressed one means nothing."""
    name = member.filename.removesuffix(".npy")
    if name == member.filename or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"load: {path} must hold .npy files and no folder, got {member.filename!r}")
    if member.compress_type not in _METHODS:
        raise ValueError(f"load: {path}: {name} must be stored or deflated, got zip's method {member.compress_type}")
    with archive.open(member) as file:
        shape, dtype, header_bytes = _header(path, name, file)
    with archive.open(member) as file:
        header_crc = zlib.crc32(file.read(header_bytes))
    size = prod(shape) * dtype.itemsize
    if header_bytes + size != member.file_size:
        raise ValueError(
            f"load: {path}: {name} must be {header_bytes + size} bytes by its header, got {member.file_size}"
        )
    begin, end = _data_begin(path, member) + header_bytes, path.stat().st_size
    if member.compress_type == zipfile.ZIP_STORED and begin + size > end:
        raise ValueError(f"load: {path}: {name} must end at byte {begin + size}, got {end} of them; is it truncated?")
    return replace(StoredTensor.packed(path, name, begin, shape, dtype), checksum=(header_crc, member.CRC))


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], torch.dtype, int]:
    """Shape, type, and the bytes before the numbers."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, kind = read(file)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"load: {path}: {name} must be an array in NumPy's format, got {reason}") from None
    if kind.hasobject:
        raise ValueError(f"load: {path}: {name} must hold numbers, got pickled objects, which could run anything")
    if kind.str not in _DTYPES:
        raise TypeError(f"load: {path}: {name} must be one of {', '.join(_DTYPES)}, got {kind.str}")
    if fortran and len(shape) > 1:
        raise ValueError(
            f"load: {path}: {name} must be stored row by row, got columns first; np.ascontiguousarray stores it so"
        )
    return tuple(int(n) for n in shape), _DTYPES[kind.str], file.tell()


def _data_begin(path: Path, member: zipfile.ZipInfo) -> int:
    """Byte of the archive where a member's data begin."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return int(member.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10])


def _unpacked(path: Path, members: list[zipfile.ZipInfo], arrays: list[StoredTensor]) -> dict[str, StoredTensor]:
    """Arrays in a safetensors file of the cache folder, which is written once."""
    size = sum(member.file_size for member in members)
    cached = cached_file("npz", [path], "", size, lambda file: _unpack(path, members, arrays, file))
    return open_safetensors(cached)


def _unpack(path: Path, members: list[zipfile.ZipInfo], arrays: list[StoredTensor], out: BinaryIO) -> None:
    """Write arrays as safetensors; zipfile checks each member's checksum as its end is read."""
    ordered = sorted(zip(arrays, members, strict=True), key=lambda pair: (-pair[0].dtype.itemsize, pair[0].name))
    header = safetensors_header({stored.name: (stored.dtype, stored.shape) for stored, _ in ordered})
    try:
        with path.open("rb") as packed, zipfile.ZipFile(packed) as archive:
            if arrays[0].state is not None:
                arrays[0].state.check(path, os.fstat(packed.fileno()))
            out.write(header)
            for stored, member in ordered:
                with archive.open(member) as file:
                    file.read(member.file_size - stored.bytes)
                    while block := file.read(_STEP):
                        out.write(block)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"load: {path} must be a whole .npz archive, got {reason}; is it damaged?") from None
