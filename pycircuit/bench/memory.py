"""Peak memory of one call, in a process of its own: resident pages at their highest minus those before."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

# Every buffer of 16 KiB or more gets pages of its own and gives them back, so that nothing is reused unseen.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def extra(row: str, implementation: str, isa: str | None, threads: int) -> int | None:
    """Bytes beyond the inputs at the highest point, the result included; None where the system does not tell."""
    if not (_RESET.exists() and os.access(_RESET, os.W_OK)):
        return None
    command = [sys.executable, "-m", "pycircuit.bench.memory", row, implementation, isa or "", str(threads)]
    done = subprocess.run(command, env={**os.environ, **_ALLOCATOR}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench: the memory of {row} could not be measured: {done.stderr.strip()}")
    return int(done.stdout)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _main() -> None:
    import torch

    import pycircuit as pc
    from pycircuit.bench.rows import ROWS
    from pycircuit.ops import cases

    parser = argparse.ArgumentParser()
    parser.add_argument("row")
    parser.add_argument("implementation")
    parser.add_argument("isa")
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    row = next(r for r in ROWS if r.name == given.row)
    args = row.build(cases.generator(7)).args
    run = getattr(pc.ops, row.op)
    with pc.use(given.implementation, isa=given.isa or None):
        run(*args)  # warm: thread stacks, library set-up
        _RESET.write_text("5")  # forget the high-water mark
        before = _resident("VmRSS:")
        run(*args)
        print(_resident("VmHWM:") - before)


if __name__ == "__main__":
    _main()
