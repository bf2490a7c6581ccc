"""Server of timed NumPy products. It runs as a script of its own and imports nothing but NumPy.

NumPy's library reads its number of threads when it loads, and its threads inherit the cores that ours are pinned to:
neither can be set well inside a process that runs torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from typing import Any

import numpy as np


@cache
def matrices(rows: int, depth: int, columns: int) -> tuple[Any, Any, Any]:
    """Matrices [rows, depth] and [depth, columns], and one for their product."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(size, dtype=np.float32) for size in ((rows, depth), (depth, columns)))
    return a, b, np.empty((rows, columns), np.float32)


def seconds(rows: int, depth: int, columns: int) -> float:
    """Return the seconds of one product; raise an ArithmeticError where a row of it is wrong."""
    a, b, out = matrices(rows, depth, columns)
    start = time.perf_counter()
    np.matmul(a, b, out=out)
    took = time.perf_counter() - start
    truth = a[-1].astype(np.float64) @ b
    if not np.linalg.norm(out[-1] - truth) <= 1e-5 * np.linalg.norm(truth):
        raise ArithmeticError("numpy's product is wrong")
    return took


def serve() -> None:
    """Answer every line [rows, depth, columns] with the seconds of such a product."""
    cores = [int(core) for core in sys.argv[1].split(",") if core]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    for line in sys.stdin:
        print(seconds(*json.loads(line)), flush=True)


if __name__ == "__main__":
    serve()
