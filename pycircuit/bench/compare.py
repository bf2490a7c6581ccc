"""Two runs side by side."""

from __future__ import annotations

from .report import Report

HEADER = ("row", "threads", "first ms", "second ms", "second is", "first of floor", "second of floor")


def lines(first: Report, second: Report) -> list[tuple[str, ...]]:
    """Rows that both runs timed, in the first one's order; speed-up above 1 means the second is faster."""
    theirs = {(r.name, r.threads, r.implementation): r for r in second.results if r.times}
    compared: list[tuple[str, ...]] = []
    for ours in first.results:
        other = theirs.get((ours.name, ours.threads, ours.implementation))
        if other is None or not ours.times:
            continue
        compared.append(
            (
                ours.name,
                str(ours.threads),
                f"{1e3 * ours.median:.3g}",
                f"{1e3 * other.median:.3g}",
                f"{ours.median / other.median:.2f}x",
                f"{100 * ours.share:.0f}%",
                f"{100 * other.share:.0f}%",
            )
        )
    return compared
