"""Damaged files of every format: an error that says so, or the numbers that are still there; never anything else.

Deterministic, and bounded in time. Mutations that make another sound file (a 2 for a 3 in a TopK's k, two tensors of
one shape under each other's names) are left out: nobody could tell.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import ROWS, write
from torch import Tensor
from transcoder_checks import dense

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each layout and container; the other rows hold the same files with fewer or more tensors.
NAMES = ("circuit_tracer", "crv", "listed", "circuit_tracer_cross", "gemma_scope", "gemma_scope_compressed",
         "gemma_scope_2_affine", "gemma_scope_2_cross", "sparsify_skip", "saelens_jumprelu_skip", "llamascopium",
         "llamascopium_cross", "crosslayer", "crosslayer_batchtopks")  # fmt: skip
CASES = 150  # of each
LONGEST = 10.0  # seconds a case may take; on a quiet machine it is hundredths

Mutation = Callable[[random.Random, bytes], bytes]


def numbers(t: Any) -> list[Tensor]:
    """Every tensor that was read, flat."""
    every = [*t.w_enc, *t.b_enc, *[None if w is None else dense(w) for w in t.w_dec], *t.b_dec, *t.w_skip]
    every += [r.theta for r in t.activation if isinstance(r, pc.JumpReLU)]
    every += [torch.tensor([r.threshold]) for r in t.activation if isinstance(r, pc.BatchTopK)]
    return [x.flatten() for x in every if x is not None]


def changed(a: list[Tensor], b: list[Tensor]) -> int:
    """The number of differing entries; -1 for other shapes."""
    if [len(x) for x in a] != [len(x) for x in b]:
        return -1
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))


def flipped(rng: random.Random, data: bytes, begin: int, end: int, count: int) -> bytes:
    out = bytearray(data)
    for index in rng.sample(range(begin, end), min(count, end - begin)):
        out[index] ^= rng.randrange(1, 256)
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 40))


def body_of(data: bytes) -> int:
    """The offset of a safetensors file's tensors."""
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def header(rng: random.Random, data: bytes) -> bytes:
    return flipped(rng, data, 0, body_of(data), rng.choice((1, 1, 2, 8)))


def body(rng: random.Random, data: bytes) -> bytes:
    return flipped(rng, data, body_of(data), len(data), rng.choice((1, 4, 16)))


def anywhere(rng: random.Random, data: bytes) -> bytes:
    return flipped(rng, data, 0, len(data), rng.choice((1, 4, 16)))


# Of an archive: what begins a record (its directory's, a member's own, the end's), and where its fields are.
RECORDS = {
    b"PK\x01\x02": (6, 8, 10, 12, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42),
    b"PK\x03\x04": (4, 6, 8, 10, 14, 18, 22, 26, 28),
    b"PK\x05\x06": (4, 6, 8, 10, 12, 16, 20),
}


def zipped(rng: random.Random, data: bytes) -> bytes:
    """One field of one record replaced, so that an archive's directory and its members tell different stories."""
    mark = rng.choice(sorted(RECORDS))
    offset = rng.choice([n for n in range(len(data)) if data.startswith(mark, n)]) + rng.choice(RECORDS[mark])
    size = rng.choice((2, 4))
    new = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, bytes([rng.randrange(20)]) + bytes(size - 1)))
    return (data[:offset] + new + data[offset + size :])[: len(data)]


VALUES: list[Any] = [None, True, -1, 0, 2**31, 2**63, 1e308, "", "x", "../x", "I8", "F64", [], [0], [2**40] * 2, {}]


def entry(rng: random.Random, data: bytes) -> bytes:
    """One field of one tensor's entry, or its name, replaced; offsets and lengths stay consistent JSON."""
    offset = body_of(data)
    entries = json.loads(data[8:offset])
    name = rng.choice(sorted(entries))
    field = rng.choice(("dtype", "shape", "data_offsets", "name", "gone", "added", "reshaped"))
    if field == "name":
        entries[name + rng.choice(("_", "\x00", "é"))] = entries.pop(name)
    elif field == "gone":
        del entries[name]
    elif field == "added":
        entries["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data) - offset] * 2}
    elif field == "reshaped":
        entries[name]["shape"] = [*entries[name]["shape"], 1]
    else:
        entries[name][field] = rng.choice(VALUES)
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data[offset:]


def config(rng: random.Random, data: bytes) -> bytes:
    """A value replaced, at any depth, or the text itself damaged."""
    if rng.random() < 0.4:
        return rng.choice((anywhere, cut, longer))(rng, data)
    text = data.decode()
    try:
        values = json.loads(text)
    except ValueError:
        lines = text.splitlines()
        index = rng.randrange(len(lines))
        lines[index] = lines[index].split(":")[0] + ": " + json.dumps(rng.choice(VALUES))
        return "\n".join(lines).encode()
    parent = values
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        inner = parent[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            parent = inner
            continue
        parent[key] = rng.choice(VALUES)
        return json.dumps(values).encode()


# container -> its mutations, and how many numbers each may change without an error
def mutations(path: Path) -> list[Mutation]:
    if path.suffix == ".safetensors":
        return [header, body, cut, longer, entry, entry]
    return [anywhere, zipped, zipped, cut, longer] if path.suffix == ".npz" else [config]


def outcome(folder: Path, overrides: dict[str, Any]) -> Any:
    """Transcoders, or the error, whose text says what is wrong with what."""
    try:
        return numbers(pc.transcoders.load(folder, lazy=False, **overrides))
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        assert text.startswith(("load: ", "PerLayerTranscoders: ", "CrossLayerTranscoder: ")), repr(error)
        assert "\n" not in text and len(text) < 2000
        return None


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, rng, overrides = tmp_path / "set", random.Random(name), ROWS[name].overrides
    write(name, folder)
    expected = numbers(pc.transcoders.load(folder, lazy=False, **overrides))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    refused = 0
    for _ in range(CASES):
        path = rng.choice(files)
        original = path.read_bytes()
        change = rng.choice(mutations(path))
        damaged = change(rng, original)
        path.write_bytes(damaged)
        begin = time.perf_counter()
        got = outcome(folder, overrides)
        assert time.perf_counter() - begin < LONGEST, (path, change)
        path.write_bytes(original)
        refused += got is None
        if got is not None and change is not config:
            flips = sum(a != b for a, b in zip(original, damaged, strict=False)) if change is body else 0
            assert 0 <= changed(got, expected) <= flips, (path.name, change.__name__)
    assert CASES // 3 < refused < CASES
    assert changed(numbers(pc.transcoders.load(folder, lazy=False, **overrides)), expected) == 0
