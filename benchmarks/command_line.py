"""Command line of the benchmarks: one flag for one thing in every script."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pycircuit.bench import sections

FOLDER = Path(__file__).parent


def parser(
    script: str,
    description: str | None,
    *,
    threads: int,
    rounds: int,
    shapes: Iterable[str] = (),
    results: bool = False,
    always: bool = False,
) -> argparse.ArgumentParser:
    """Parser with --threads and --rounds; with --shape where there are shapes, --json and --markdown for results.

    always: results have a file whatever the shapes; otherwise only where all of them run.
    """
    made = argparse.ArgumentParser(
        f"benchmarks/{script}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=threads, help=f"threads that compute; default {threads}")
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed runs of each case; default {rounds}")
    if shapes:
        made.add_argument("--shape", choices=list(shapes), action="append", help="only this one; may be repeated")
    if results:
        numbers, tables = (FOLDER / "results" / f"{script}-cpu.json", FOLDER / "RESULTS.md") if always else (None, None)
        default = "; default {}" if always else "; default {} where all shapes run" if shapes else "; default none"
        made.add_argument(
            "--json",
            type=Path,
            default=numbers,
            help="file for the numbers" + default.format(f"results/{script}-cpu.json"),
        )
        section = "file whose section is written" + default.format("RESULTS.md")
        made.add_argument("--markdown", type=Path, default=tables, help=section)
    return made


def publish(options: argparse.Namespace, section: str, results: dict[str, Any], text: str) -> None:
    """Print the text; write the numbers and the section of RESULTS.md, by default where all shapes ran."""
    print(text)
    numbers, markdown = options.json, options.markdown
    if "shape" in options and options.shape is None:
        numbers = numbers or FOLDER / "results" / f"{section}-cpu.json"
        markdown = markdown or FOLDER / "RESULTS.md"
    if numbers:
        numbers.write_text(json.dumps(results, indent=1) + "\n")
    if markdown:
        sections.put(markdown, section, text)
