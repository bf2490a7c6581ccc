"""The figures of a run as Markdown: for the terminal, and for docs/truth.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]
CHANGES = {0.0: "ablated", 2.0: "doubled"}
FROZEN = {"attention": "patterns and norms", "patterns": "patterns", "none": "nothing"}
GOALS = {"demo": 0.9, "smollm2": 0.7}  # correlation of ablated supernodes' effects with nothing held
SIGN_GOAL = 0.9
EVERYTHING = ("probability without any feature", "probability")
CIRCUITS = {
    "pruned": "pruned graph",
    "gradient": "as many, gradient times activation",
    "chance": "as many, by chance",
    "as many": "as many as the first set's, by influence",
}


def section(document: Document) -> str:
    """Everything of one model, under a heading of its own."""
    sets = document["sets"]
    blocks = [
        f"## {document['model']}",
        _run(document),
        _table(("transcoders", "active features", "replacement", "completeness", "error share"), _scores(sets)),
        "### Effects on the answer\n\nCorrelation (95% interval), slope and sign agreement of predicted with measured.",
        _table(("transcoders", "changed", "held", "graph", "replacement model", "gradient"), _effects(sets)),
        "### Effects of ablated features on features above, by layers between\n\nCorrelation: graph, then replacement "
        "model.",
        *_distances(sets),
        "### Circuits\n\nNothing is held. Sufficiency and necessity: the answer's lead over the runner-up with the "
        "circuit alone, and lost without it, as a share of what all features do.",
        _table(
            ("transcoders", "circuit", "features", "sufficiency", "necessity", "probability alone", "without"),
            _circuits(sets),
        ),
        "### Errors\n\nRank correlation, over prompts, of a graph's error share with the share of its ablated "
        "features' effects on the answer that is missed.",
        _table(
            ("transcoders", "by the graph, patterns and norms held", "by the replacement model, nothing held"),
            _errors(document["errors"]),
        ),
        "### Goals",
        "\n".join(f"- {line}" for line in _goals(document)),
    ]
    return "\n\n".join(blocks) + "\n"


def _run(document: Document) -> str:
    questions = document["questions"]
    behaviours = dict.fromkeys(q["behaviour"] for q in questions)
    probability = sum(q["probability"] for q in questions) / len(questions)
    machine = document["machine"]
    return (
        f"{len(questions)} prompts over {len(behaviours)} behaviours ({'; '.join(behaviours)}), answered with "
        f"{100 * probability:.0f}% on average. {document['processor_minutes']:g} processor minutes on "
        f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _scores(sets: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, f"{s['active'][0]:,.0f}", *(_interval(s[k]) for k in ("replacement", "completeness", "error share"))]
        for name, s in sets.items()
    ]


def _interval(values: Sequence[float | None]) -> str:
    """`0.81 (0.78 to 0.84)`; `-` for a value that is not defined."""
    value, low, high = (_number(v) for v in values)
    return "-" if value == "-" else f"{value} ({low} to {high})"


def _effects(sets: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for kind in ("supernode", "feature"):
        for name, s in sets.items():
            for e in sorted(s["effects"], key=lambda e: (e["factor"], list(FROZEN).index(e["freeze"]))):
                if e["kind"] == kind:
                    changed = f"{kind} {CHANGES[e['factor']]}"
                    cells = [_agreement(e["answer"][p]) for p in ("graph", "replacement", "gradient")]
                    rows.append([name, changed, FROZEN[e["freeze"]], *cells])
    return rows


def _agreement(figures: Mapping[str, Any]) -> str:
    if not figures.get("pairs"):
        return "-"
    signs = figures["signs"][0]
    share = "-" if signs is None else f"{100 * signs:.0f}%"
    return f"{_interval(figures['correlation'])}, {_number(figures['slope'][0])}, {share}"


def _distances(sets: Mapping[str, Any]) -> list[str]:
    chosen = {
        (name, e["freeze"]): e["by layers between"]
        for name, s in sets.items()
        for e in s["effects"]
        if e["kind"] == "feature" and e["factor"] == 0 and e["freeze"] != "patterns"
    }
    distances = sorted({int(d) for by in chosen.values() for d in by})
    if not distances:
        return []
    rows = [
        [name, FROZEN[freeze], *(_pair(by.get(str(d), {})) for d in distances)] for (name, freeze), by in chosen.items()
    ]
    return [_table(("transcoders", "held", *map(str, distances)), rows)]


def _pair(figures: Mapping[str, Any]) -> str:
    values = [figures.get(name, {}).get("correlation", [None])[0] for name in ("graph", "replacement")]
    return " / ".join(map(_number, values))


def _circuits(sets: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, s in sets.items():
        for circuit, figures in s["circuits"].items():
            if circuit in CIRCUITS:
                shares = (_interval(figures[k]) for k in ("sufficiency", "necessity"))
                odds = (f"{100 * figures[f'probability {k}'][0]:.0f}%" for k in ("alone", "without"))
                rows.append([name, CIRCUITS[circuit], f"{figures['features'][0]:.0f}", *shares, *odds])
        alone, without = (f"{100 * s['circuits']['everything'][k][0]:.0f}%" for k in EVERYTHING)
        rows.append([name, "no feature", "0", "0", "0", alone, without])
    return rows


def _errors(errors: Mapping[str, Any]) -> list[list[str]]:
    relations = {**errors["by set"], "all of them": errors["all sets"]}
    return [[name, *(_number(r[predictor]) for predictor in ("graph", "replacement"))] for name, r in relations.items()]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0e}"


def _goals(document: Document) -> list[str]:
    """One line a goal and a set of trained transcoders, with MISSED where it was."""
    goal, lines = GOALS.get(document["model"], GOALS["smollm2"]), []
    for name in document["transcoders"]:
        for e in document["sets"][name]["effects"]:
            if (e["kind"], e["freeze"], e["factor"]) == ("supernode", "none", 0.0):
                for predictor in ("graph", "replacement"):
                    figures = e["answer"][predictor]
                    for measure, least in (("correlation", goal), ("signs", SIGN_GOAL)):
                        value = figures.get(measure, [None])[0]
                        missed = "" if value is not None and value >= least else " MISSED"
                        lines.append(f"{name}, {predictor}: {measure} {_number(value)} of {least:g}{missed}")
    return lines
