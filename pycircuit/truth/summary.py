"""The figures of all records: means and agreements with their intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .statistics import Pairs, agreement, mean, rank_correlation, ratio

Record = dict[str, Any]
ANSWER = {"graph": 1, "gradient": 2, "replacement": 3}  # columns of effects on the answer; the first is measured
ABOVE = {"graph": 2, "replacement": 3}  # columns of effects on features; the second is measured
MOST_DISTANCE = 8  # layers between; farther ones count as that far


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Everything that docs/truth.md shows, as plain values."""
    names = list(records[0]["sets"])
    sets = {name: _set([record["sets"][name] for record in records]) for name in names}
    questions = [{k: r[k] for k in ("behaviour", "prompt", "answer", "probability")} for r in records]
    return rounded({"sets": sets, "errors": _errors(records, names), "questions": questions})


def rounded(value: Any) -> Any:
    """The value with its numbers to five digits, and None for those that are not finite."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def _set(parts: Sequence[Record]) -> dict[str, Any]:
    """Figures of one set of transcoders. parts: its measurements, one a prompt."""
    return {
        "replacement": mean([p["replacement"] for p in parts]),
        "completeness": mean([p["completeness"] for p in parts]),
        "error share": mean([1 - p["replacement"] for p in parts]),
        "certificate": max(p["certificate"] for p in parts),
        "active": mean([p["active"] for p in parts]),
        "circuits": _circuits([p["outcomes"] for p in parts]),
        "effects": _effects(parts),
    }


def _circuits(outcomes: Sequence[Record]) -> dict[str, Any]:
    """Sufficiency and necessity of each circuit, as shares of what all features together do for the margin."""
    out = {}
    scale = [o["all"][1] - o["none"][1] for o in outcomes]
    for name in outcomes[0]["sizes"]:
        gained = [o[f"only {name}"][1] - o["none"][1] for o in outcomes]
        lost = [o["all"][1] - o[f"without {name}"][1] for o in outcomes]
        out[name] = {
            "features": mean([o["sizes"][name] for o in outcomes]),
            "sufficiency": ratio(gained, scale),
            "necessity": ratio(lost, scale),
            "probability alone": mean([o[f"only {name}"][0] for o in outcomes]),
            "probability without": mean([o[f"without {name}"][0] for o in outcomes]),
        }
    out["everything"] = {
        "probability": mean([o["all"][0] for o in outcomes]),
        "probability without any feature": mean([o["none"][0] for o in outcomes]),
    }
    return out


def _effects(parts: Sequence[Record]) -> list[dict[str, Any]]:
    """Agreement for every kind of source, freeze and factor: on the answer, on features, and by distance."""
    keys = sorted({(e["kind"], e["freeze"], e["factor"]) for p in parts for e in p["effects"]})
    out = []
    for key in keys:
        entries = [next((e for e in p["effects"] if (e["kind"], e["freeze"], e["factor"]) == key), None) for p in parts]
        answers = [_columns(entry, "answer") for entry in entries]
        above = [_columns(entry, "above") for entry in entries]
        nearest = [np.minimum(rows[:, 0], MOST_DISTANCE) for rows in above]
        distances = np.unique(np.concatenate(nearest)).astype(int).tolist()
        kind, freeze, factor = key
        figures = {
            "kind": kind,
            "freeze": freeze,
            "factor": factor,
            "answer": {name: agreement([_pairs(rows, 0, i) for rows in answers]) for name, i in ANSWER.items()},
            "features": {name: agreement([_pairs(rows, 1, i) for rows in above]) for name, i in ABOVE.items()},
            "by layers between": {
                str(d): {
                    name: agreement([_pairs(r[n == d], 1, i) for r, n in zip(above, nearest, strict=True)])
                    for name, i in ABOVE.items()
                }
                for d in distances
            },
        }
        out.append(figures)
    return out


def _columns(entry: Record | None, name: str) -> np.ndarray:
    """Rows of an entry's answer or above: [rows, 4]."""
    return np.array([] if entry is None else entry[name], np.float64).reshape(-1, 4)


def _pairs(rows: np.ndarray, measured: int, predicted: int) -> Pairs:
    return rows[:, predicted], rows[:, measured]


def _errors(records: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Error share against the missed share of ablated features' effects, prompt by prompt, and their rank relation.

    A point is (error share, missed by the graph with patterns and norms held, missed by the replacement model with
    nothing held). Sets without a replacement model, whose features are exact, have no third.
    """
    out: dict[str, Any] = {}
    pooled: list[list[float]] = []
    for name in names:
        points = []
        for record in records:
            measured = record["sets"][name]
            entries = {e["freeze"]: e for e in measured["effects"] if e["kind"] == "feature" and e["factor"] == 0}
            if entries:
                by_graph = _missed(entries["attention"], ANSWER["graph"])
                by_replacement = _missed(entries["none"], ANSWER["replacement"])
                points.append([1 - measured["replacement"], by_graph, by_replacement])
        pooled += points
        out[name] = {"points": points, **_relation(points)}
    return {"by set": out, "all sets": _relation(pooled)}


def _missed(entry: Record, predictor: int) -> float:
    """Mean |measured - predicted| over mean |measured|, on the answer; NaN without a prediction."""
    predicted, measured = _pairs(_columns(entry, "answer"), 0, predictor)
    known = np.isfinite(predicted) & np.isfinite(measured)
    size = np.abs(measured[known]).sum()
    return float(np.abs(measured - predicted)[known].sum() / size) if size > 0 else float("nan")


def _relation(points: Sequence[Sequence[float]]) -> dict[str, float]:
    columns = np.array(points, np.float64).reshape(-1, 3).T.tolist()
    return {name: rank_correlation(columns[0], columns[i]) for i, name in enumerate(ABOVE, 1)}
