"""Every option of circuit-tracer's command line has its line in our table."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "command-line.md"


def test_every_option_of_theirs_is_in_the_table() -> None:
    spec = find_spec("circuit_tracer")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "__main__.py").read_text()
    options = set(re.findall(r'"(--?[a-z][\w-]*)"', source)) | set(re.findall(r'add_parser\(\s*"([\w-]+)"', source))
    table = "".join(line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `"))
    assert {"--prompt", "-o", "--lazy-decoder", "start-server"} <= options
    assert options <= set(re.findall(r"`([\w-]+)`", table))
