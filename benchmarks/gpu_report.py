"""Text table of a GPU run's report."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def table(report: Report) -> str:
    """Table of sections with their seconds and figures, then the red marks."""
    lines = [report["dry_run"]] if report["dry_run"] else []
    for name, section in report["sections"].items():
        lines.append(f"{name:<10}{section['state']:<24}{section.get('seconds', 0):>7.1f} s")
        results = section.get("results", {})
        lines += [f"    {line}" for line in FIGURES.get(name, _traces)(results)]
    return "\n".join([*lines, *(f"RED {why}" for why in report["red"])])


def _traces(results: Report) -> list[str]:
    """One line per run of every entry, or the reason why it has none."""
    lines = []
    for name, entry in results.items():
        if not isinstance(entry, dict):
            continue
        runs = [entry] if "timings" in entry else entry.get("runs", [])
        for run in runs:
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in run["timings"].items())
            lines.append(f"{name:<34}{run['seconds']:>8.2f} s  certificate {run['certificate']:.1e}  ({phases})")
        if "rows a second" in entry:
            lines.append(f"{name:<34}{entry['rows a second']:>8.0f} rows/s")
        lines += [f"{name:<34}{word}: {entry[word]}" for word in ("skipped", "stopped", "unavailable") if word in entry]
    return lines


def _card(results: Report) -> list[str]:
    lines = []
    for name, rates in results.items():
        if name.startswith("product"):
            shown = [f"{k} {r['tflops']:.0f}" for k, r in rates.items() if isinstance(r, dict) and "tflops" in r]
            lines.append(f"{name}: {', '.join(shown)} TFLOP/s")
        elif name.startswith("transfers"):
            shown = [f"{k} {rate:.1f}" for k, rate in rates.items() if isinstance(rate, float)]
            lines.append(f"{name}: {', '.join(shown)}")
    return lines


def _tests(results: Report) -> list[str]:
    return [f"{results.get('counts', 'not counted')}"]


def _ops(results: Report) -> list[str]:
    lines = []
    for row in results.get("rows", []):
        name = f"{row['op']:<12}{row['shape']:<40}"
        if "ms" not in row:
            lines.append(f"{name} {row.get('wrong') or row.get('skipped') or row.get('unavailable')}")
            continue
        library = f"{row['library_ratio']:.2f} x library" if row["library_ratio"] else ""
        lines.append(
            f"{name}{row['ms']:>9.3f} ms  {row['share_of_floor']:>4.0%} of floor  {row['reference_ratio']:.2f} x "
            f"reference  error {row['error']:.1e}  {library}".rstrip()
        )
    return lines


def _tune(results: Report) -> list[str]:
    lines = []
    for row in results.get("rows", []):
        times, best, recorded = row["times_ms"], row.get("best"), row.get("recorded")
        lines.append(f"{row['op']} {row['class']}: {len(times)} tried")
        if best is not None:
            lines.append(f"    best {times[best]:.3f} ms: {best}; recorded {times.get(recorded)} ms: {recorded}")
    return lines


def _compile(results: Report) -> list[str]:
    done = [task for task in results.values() if isinstance(task, dict) and "failed" in task]
    failed = [why for task in done for why in task["failed"]]
    compilations = sum(task["compilations"] for task in done)
    return [f"{len(done)} tasks, {compilations} compilations, {len(failed)} failed launches", *failed]


FIGURES = {"card": _card, "tests": _tests, "ops": _ops, "tune": _tune, "compile": _compile}
