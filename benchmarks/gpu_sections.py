"""One section of `make gpu`, in a process of its own, so that its errors, the card's included, end no other."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gpu_files import ROOT, SECONDS, Section

FUNCTIONS = {
    "compile": "gpu_compile.compile_kernels",
    "card": "gpu_card.card",
    "plt": "gpu_trace.plt",
    "tests": "gpu_tests.run_tests",
    "clt": "gpu_trace.clt",
    "long": "gpu_trace.long",
    "taped": "gpu_taped.tape",
    "ops": "gpu_measure.ops",
    "tune": "gpu_measure.tune",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_sections", description=__doc__)
    parser.add_argument("name", choices=SECONDS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="until then it measures")
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every result")
    parser.add_argument("--results", type=Path, required=True, help="a folder for other files")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests")
    return parser.parse_args(arguments)


def stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, stop)
    deadline = time.monotonic() + options.seconds
    section = Section(options.device, deadline, options.out, options.results.resolve(), options.tests.resolve())
    module, function = FUNCTIONS[options.name].split(".")
    getattr(importlib.import_module(module), function)(section)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
