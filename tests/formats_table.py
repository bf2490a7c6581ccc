"""The table of formats in docs/transcoders.md, measured by loading and converting.

`python tests/formats_table.py` writes it.

Names and files come from the registry; a small set of each format shows the classes it loads as, where their weights
lie, and the formats that a conversion leads to.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import format_files
from torch import Tensor

import pycircuit as pc
from pycircuit.transcoders import formats
from pycircuit.transcoders.formats import cached_encoder, saving
from pycircuit.transcoders.lazy import LazyRows

PAGE = Path(__file__).parents[1] / "docs" / "transcoders.md"
BEGIN, END = "<!-- formats -->\n", "<!-- /formats -->\n"


def in_a_file(t: Tensor) -> bool:
    """True if a tensor's memory is that of a mapped file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(n, 16) for n in line.split()[0].split("-"))
        if begin <= t.data_ptr() < end:
            return line.endswith((".safetensors", ".npz"))
    return False


def left_in_files(t: Any) -> set[str]:
    """Kinds of weights that stay in files in every layer."""
    names = {"decoders"} if all(isinstance(w, LazyRows) for w in t.w_dec) else set()
    return names | ({"encoders"} if all(in_a_file(w) for w in t.w_enc) else set())


def written(folder: Path) -> dict[str, list[str]]:
    """Names of layouts to convert to, by the format they lead to."""
    layouts: dict[str, list[str]] = {}
    for name in ("saelens", "circuit_tracer_cross"):
        format_files.write(name, folder / name)
        for to in saving.LAYOUTS:
            if to != "saelens" or name == "saelens":
                made = pc.transcoders.convert(folder / name, folder / f"{name}-{to}", to)
                layouts.setdefault(pc.transcoders.recognise(made).format.name, []).append(to)
    return layouts


def table(folder: Path) -> str:
    """folder: an empty one to work in."""
    ends, lines = written(folder), ["| format | known by | layers | lazy | written |", "|---|---|---|---|---|"]
    for name, row in formats.FORMATS.items():
        kinds, lazy = set(), {"decoders", "encoders"}
        for example, of in format_files.ROWS.items():
            if of.format == name:
                format_files.write(example, folder / "sets" / example)
                got = pc.transcoders.load(folder / "sets" / example, **of.overrides)
                kinds.add("cross-layer" if isinstance(got, pc.CrossLayerTranscoder) else "per layer")
                lazy &= left_in_files(got)
        files = re.sub(r"([\w/]*[*_.:][\w*/.:]*)", r"`\1`", row.files)
        targets = ", ".join(f"`{to}`" for to in sorted(ends.get(name, [])))
        left = "yes" if lazy == {"decoders", "encoders"} else ", ".join(sorted(lazy)) or "no"
        lines.append(f"| {name} | {files} | {', '.join(sorted(kinds))} | {left} | {targets} |")
    return "\n".join(lines) + "\n"


def on_the_page() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    cached_encoder.LEAST_BYTES = 0
    with tempfile.TemporaryDirectory() as place:
        os.environ["PYCIRCUIT_CACHE"] = str(Path(place) / "cache")
        before, _, after = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(Path(place)) + END + after.partition(END)[2])
