"""Results of `make gpu` in the repository: JSON by the card's name, and the section of RESULTS.md.

python benchmarks/gpu_results.py folder/gpu.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import predictions

from pycircuit.bench import sections

FOLDER = Path(__file__).parent
TITLE = """# On a GPU

Written by `python benchmarks/gpu_results.py` from runs of `make gpu`; do not edit. `pc.attribute` from token ids to
graph, models built on the card, medians of the runs after a warm-up. *Phases* are by the host's clock, which does not
wait for the card: what the card has left to do when the sweep is issued is in *graph*. *Edges*: the largest distance
of a row from the float32 graph's, relative to it. Rows of earlier commits show what a later one lacks, or was before.
The rest is of the last run that has it: *predicted* is the share of the floor in PREDICTIONS.md, from before any run;
floors are those of plain float32 units or of a copy, measured in the same run."""


def results(report: dict[str, Any], section: str) -> dict[str, Any]:
    return report["sections"].get(section, {}).get("results", {})


def _last(reports: list[dict[str, Any]], section: str) -> dict[str, Any]:
    """Last run that has results of a section; the last run comes first."""
    return next((report for report in reports if results(report, section)), reports[0])


def markdown(reports: list[dict[str, Any]]) -> str:
    """Section of RESULTS.md; the last run comes first."""
    taped, ops = _last(reports, "taped"), _last(reports, "ops")
    blocks = [[TITLE], _machine(reports), _traces(reports), _taped(taped), _ops(ops), _open(reports[0])]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _machine(reports: list[dict[str, Any]]) -> list[str]:
    """Measurements of the card, each from the last run that has it."""
    card: dict[str, Any] = {}
    for report in reversed(reports):
        card |= results(report, "card")
    about, rates, launch = card["machine"], card["transfers GB/s"], card["launches"]["torch launch"]["us"]
    when = ", ".join(f"{report['commit'][:7]} ({report['when'][:16].replace('T', ' ')} UTC)" for report in reports)
    return [
        f"- commits {when}",
        f"- {about['gpu']}, {about['memory'] / 2**30:.0f} GiB, torch {about['torch']}, triton {about['triton']}",
        f"- copy {rates['copy'] / 1e3:.2f} TB/s, to the host {rates['D2H pinned']:.0f} GB/s pinned, "
        f"{rates['D2H pageable']:.0f} pageable; a launch takes the host {launch:.1f} us",
        *(f"- {line}" for line in _products(card)),
    ]


def _products(card: dict[str, Any]) -> Iterator[str]:
    for name, rates in card.items():
        if name.startswith("product"):
            measured = {k: r for k, r in rates.items() if isinstance(r, dict) and "tflops" in r}
            shown = ", ".join(f"{k} {r['tflops']:.0f} ({r['error']:.0e})" for k, r in measured.items())
            yield f"{name}, TFLOP/s (error): {shown}"


def _traces(reports: list[dict[str, Any]]) -> list[str]:
    head = (
        "shape and precision",
        "commit",
        "runs",
        "median s",
        "range s",
        "phases s",
        "certificate",
        "edges",
        "card GB",
    )
    lines = [f"| {' | '.join(head)} | rows | entries |", "|---" * 11 + "|"]
    for report in reports:
        for section in ("plt", "clt", "long"):
            for name, entry in results(report, section).items():
                runs = entry.get("runs", [entry] if "timings" in entry else []) if isinstance(entry, dict) else []
                if runs and "warm-up" not in name:
                    edges = entry.get("agreement", {}).get("largest distance")
                    lines.append(_trace(name, report["commit"][:7], runs, edges))
    return lines


def _trace(name: str, commit: str, runs: list[dict[str, Any]], edges: float | None) -> str:
    seconds = sorted(run["seconds"] for run in runs)
    phases = {phase: median(run["timings"][phase] for run in runs) for phase in runs[0]["timings"]}
    shown = ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items())
    last = runs[-1]
    cells = (
        name,
        commit,
        len(runs),
        f"{median(seconds):.2f}",
        f"{seconds[0]:.2f} to {seconds[-1]:.2f}",
        shown,
        f"{max(run['certificate'] for run in runs):.1e}",
        "" if edges is None else f"{edges:.1e}",
        f"{last['peak device bytes'] / 1e9:.1f}",
        last["rows"],
        last["entries"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _taped(report: dict[str, Any]) -> list[str]:
    lines = ["| circuit-tracer's algorithm on the same model | rows/s | of 7,500 rows, s | largest distance of a row |"]
    lines.append("|---" * 4 + "|")
    for name, entry in results(report, "taped").items():
        if "rows a second" in entry:
            longer = entry["extrapolated seconds"]
            total = entry["setup seconds"] + longer["sweep"] + longer["rankings"]
            distance = entry["largest distance of a row from ours"]
            lines.append(f"| {name} | {entry['rows a second']:.0f} | {total:.1f} | {distance:.1e} |")
    why = "Rows a second are measured over 512 rows; the seconds add its set-up and rankings, extrapolated."
    return [*lines, "", why] if len(lines) > 2 else []


def _ops(report: dict[str, Any]) -> list[str]:
    columns = "ms | floor ms | of floor | predicted | x reference | x library | error |"
    lines = [f"| op at {report['commit'][:7]} | {columns}", "|---" * 8 + "|"]
    for row in results(report, "ops").get("rows", []):
        name = f"{row['op']} {row['shape']}"
        if "ms" not in row:
            lines.append(f"| {name} | {row.get('wrong') or row.get('skipped') or row.get('unavailable')} |" + " |" * 6)
            continue
        share = predictions.SHARES_BFLOAT16.get(row["op"]) if "bfloat16" in row["shape"] else None
        library = f"{row['library_ratio']:.2f}" if row["library_ratio"] else ""
        cells = (
            name,
            f"{row['ms']:.3f}",
            f"{row['floor_ms']:.3f}",
            f"{row['share_of_floor']:.0%}",
            f"{share or predictions.SHARES[row['op']]:.0%}",
            f"{row['reference_ratio']:.2f}",
            library,
            f"{row['error']:.1e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _open(report: dict[str, Any]) -> list[str]:
    outcomes = results(report, "tests").get("outcomes", {}).values()
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(o["outcome"] for o in outcomes).items()) or "none ended"
    states = {name: entry["state"] for name, entry in report["sections"].items() if entry["state"] != "finished"}
    return [f"- tests on the card: {counts}", *(f"- {n}: {s}" for n, s in states.items()), *_red(report)]


def _red(report: dict[str, Any]) -> list[str]:
    return [f"- red: {why}" for why in report["red"]]


def main(paths: list[Path]) -> None:
    reports = [json.loads(path.read_text()) for path in paths]
    card = re.sub(r"\W+", "-", results(_last(reports, "card"), "card")["machine"]["gpu"].lower()).removeprefix(
        "nvidia-"
    )
    for path, report in zip(paths, reports, strict=True):
        for entry in report["sections"].values():  # they name folders of the machine
            entry.pop("log", None)
            entry.get("results", {}).pop("options", None)
        if report["dry_run"]:
            raise SystemExit(f"gpu_results: {path} must be a run on a GPU, got a {report['dry_run']}")
        name = card if report is reports[0] else f"{card}-{report['commit'][:7]}"
        (FOLDER / "results" / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    sections.put(FOLDER / "RESULTS.md", "gpu", markdown(reports))


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
