"""The files in the package are what the source builds, from the lock file."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "pycircuit" / "page" / "static"
LARGEST = 200_000  # bytes of everything


def test_a_new_build_gives_the_same_files(tmp_path: Path) -> None:
    command = ["npx", "vite", "build", "--outDir", str(tmp_path / "static"), "--logLevel", "error"]
    subprocess.run(command, cwd=ROOT / "page", check=True, timeout=120)
    built = {path.name: path.read_bytes() for path in (tmp_path / "static").iterdir()}
    assert set(built) == {path.name for path in STATIC.iterdir()} == {"index.html", "icon.svg", "page.css", "page.js"}
    stale = [name for name, content in built.items() if (STATIC / name).read_bytes() != content]
    assert stale == [], "run `make page`"
    assert sum(map(len, built.values())) < LARGEST


def test_the_lock_file_names_no_host() -> None:
    assert '"resolved"' not in (ROOT / "page" / "package-lock.json").read_text()
