"""circuit-tracer and pycircuit on the standard shapes: the same weights, each case in a process of its own.

Edges and the selection must agree before a ratio is printed. Run it with `make bench-peers [SHAPE=small]`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pycircuit as pc
from pycircuit.bench import machine_rates, memory, models, sections, whole_trace
from pycircuit.bench.shapes import SHAPES, Shape
from pycircuit.bench.whole_trace import Traced
from pycircuit.integrations import circuit_tracer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "peers"))

PEER, DROP_IN, THREADS, INTERVAL = "circuit-tracer", "drop-in", 2, 4  # INTERVAL: the peer's update_interval
ROW = 1e-4  # of a row's norm
COMMON = 0.99  # of the features chosen, and of those active: float32 decides ties
MEMORY_4K = 6e9
TINY = Shape("tiny", 3, 64, 4, 4, 16, 256, 8, 32, 48, "cpu")


@dataclass(frozen=True)
class Plan:
    """batches: the peer's, its best first; least: ratios to the peer asked for, one a batch; drop_in: that of its own
    `attribute` to ours on its own model, at its best batch."""

    shape: Shape
    batches: tuple[int, ...]
    least: tuple[float, ...] = ()
    reference: float | None = None
    rate: float | None = None
    memory: float | None = None
    phase: float | None = None
    drop_in: float | None = None


PLANS = {
    plan.shape.name: plan
    for plan in (
        Plan(TINY, (4, 256), drop_in=0),
        Plan(SHAPES["small"], (16, 256), (5, 20), reference=2, rate=0.45, phase=0.2, drop_in=5),
        Plan(SHAPES["medium"], (32,), (8,), reference=2, rate=0.5),
        Plan(SHAPES["long"], (8,), (10,), memory=0.25),
        Plan(SHAPES["long4k"], ()),
    )
}


@dataclass(frozen=True)
class Case:
    """batch: the peer's; our rounds are its batches between two refreshes. 0: pycircuit alone, as users run it."""

    shape: str
    what: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.shape}/{self.what}" + (f"/batch {self.batch}" if self.batch else "")

    @property
    def round_size(self) -> int | None:
        return INTERVAL * self.batch if self.batch else None


# One case, in a process of its own


def run_case(case: Case, out: Path) -> None:
    shape = PLANS[case.shape].shape
    torch.set_num_threads(THREADS)
    load = machine_rates.load()
    found, rows = (_peer if case.what in (PEER, DROP_IN) else _ours)(
        case, shape, Traced(case.shape, case.name, THREADS)
    )
    found.load = load
    np.savez(out, **rows, found=json.dumps(found.as_json()))


def _measure(found: Traced, call: Any, least: int, most_seconds: float) -> Any:
    """Runs `call`: the first one's memory, every one's time; again up to `least` while they are short."""
    found.base, others = memory.restart_peak(), machine_rates.Others()
    kept = None
    while not found.times or (len(found.times) < least and sum(found.times) < most_seconds):
        result, seconds = whole_trace.clocked(call)
        if not found.times:
            found.peak, kept = memory.peak(), result
        found.add(seconds, getattr(result, "timings", {}))
    found.others = others.cores()
    return kept


def _ours(case: Case, shape: Shape, found: Traced) -> tuple[Traced, dict[str, Any]]:
    import pair

    model, ids = models.replacement(shape), models.prompt(shape.positions)

    def once(tokens: torch.Tensor = ids, most: int = shape.targets) -> pc.Graph:
        with pc.use(case.what):
            if not case.batch:
                return pc.attribute(model, tokens, max_features=most, progress=False)
            local, seconds = whole_trace.clocked(lambda: pair.without_first_errors(model.freeze(tokens)))
            graph = pair.trace_frozen(model, local, max_features=most, round_size=case.round_size)
        graph.timings["forward"] = seconds + graph.timings.get("forward", 0.0)
        return graph

    once(ids[:8], 8)
    graph = _measure(found, once, 3, 60)
    found.describe(graph, shape)
    rows = _our_rows(graph) if case.batch else {}
    if case.batch:  # the law holds with every error in place, so it is one more run
        del graph
        with pc.use(case.what):
            graph = pc.attribute(model, ids, max_features=shape.targets, round_size=case.round_size, progress=False)
    found.certificate = graph.certificate
    return found, rows


def _our_rows(graph: pc.Graph) -> dict[str, Any]:
    kept = pair_selected(graph)
    order = torch.argsort(kept.row_node)
    dense = kept.to_scipy()[kept.row_node[order].numpy()].toarray()
    return {"active": graph.features.numpy(), "selected": kept.features.numpy(), "rows": dense[:, : kept.first_target]}


def pair_selected(graph: pc.Graph) -> pc.Graph:
    import pair

    return pair.selected(graph)


def _peer(case: Case, shape: Shape, found: Traced) -> tuple[Traced, dict[str, Any]]:
    import pair

    size = pair.Size(
        shape.layers, shape.width, shape.heads, shape.kv_heads, shape.head_width, models.MLP_FACTOR * shape.width,
        models.VOCABULARY, shape.features, 4096,
    )  # fmt: skip
    weights = models.transcoder_weights(shape)
    model = pair.circuit_tracer_of("llama", models.language_model(shape), pair.Kind(), weights, size, torch.float32)
    del weights
    ids = models.prompt(shape.positions)

    def once(tokens: torch.Tensor = ids, most: int = shape.targets, batch: int = case.batch) -> Any:
        settings = {"batch_size": batch, "update_interval": INTERVAL, "max_feature_nodes": most}
        if case.what == DROP_IN:
            return circuit_tracer.attribute(tokens, model, **settings)
        return pair.trace_circuit_tracer(model, tokens, **settings)

    once(ids[:8], 8, 8)
    graph = _measure(found, once, 3, 15)
    chosen = graph.active_features[graph.selected_features]
    found.active, found.rows = len(graph.active_features), len(chosen) + len(graph.logit_targets)
    outputs = len(graph.logit_targets)
    matrix = graph.adjacency_matrix
    rows = torch.cat([matrix[: len(chosen)], matrix[-outputs:]])[:, : len(matrix) - outputs]
    return found, {"active": graph.active_features.numpy(), "selected": chosen.numpy(), "rows": rows.numpy()}


# Agreement


def _keys(features: np.ndarray) -> np.ndarray:
    """[n] one number for each (layer, position, feature)."""
    layer, position, feature = features.astype(np.int64).T
    return (layer << 48) | (position << 32) | feature


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Shares of active and of chosen features in common, and the largest distance of two common rows over the norm.

    A row's columns are the features chosen by both, all errors and all tokens.
    """
    active = [_keys(x["active"]) for x in (ours, theirs)]
    chosen = [_keys(x["selected"]) for x in (ours, theirs)]
    both, at, their_at = np.intersect1d(*chosen, return_indices=True)
    rows = []
    for x, where in ((ours, at), (theirs, their_at)):
        count = len(x["selected"])
        kept = x["rows"][np.r_[where, count : len(x["rows"])]]
        rows.append(kept[:, np.r_[where, count : kept.shape[1]]].astype(np.float64))
    norm = np.linalg.norm(rows[1], axis=1)
    if rows[0].shape != rows[1].shape or not (norm > 0).all():
        raise ValueError(f"peers: rows must have the same shape, got {rows[0].shape} and {rows[1].shape}")
    return {
        "active": len(np.intersect1d(*active)) / max(map(len, active)),
        "chosen": len(both) / max(map(len, chosen)),
        "rows": float((np.linalg.norm(rows[0] - rows[1], axis=1) / norm).max()),
    }


def agrees(found: dict[str, float]) -> bool:
    return found["active"] >= COMMON and found["chosen"] >= COMMON and found["rows"] <= ROW


# The whole comparison


def _spawn(case: Case, prefix: list[str]) -> tuple[Traced, dict[str, Any]]:
    print(f"{case.name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.npz"
        own = [sys.executable, __file__, "--case", case.shape, case.what, str(case.batch), "--out", str(out)]
        subprocess.run([*prefix, *own], check=True)
        with np.load(out) as file:
            whole = dict(file)
    return whole_trace.from_json(json.loads(str(whole.pop("found")))), whole


@dataclass
class Compared:
    """One shape: cases by name, agreements with the peer or between ours by name, what was asked for and what came."""

    plan: Plan
    cases: dict[str, Traced]
    agreements: dict[str, dict[str, float]]
    verdicts: list[str]

    @property
    def right(self) -> bool:
        certified = all(t.certificate is None or t.certificate < whole_trace.LAW for t in self.cases.values())
        return certified and all(map(agrees, self.agreements.values()))


def compare(plan: Plan, rate: float, prefix: list[str]) -> Compared:
    cases: dict[str, Traced] = {}
    rows: dict[Case, dict[str, Any]] = {}
    agreements: dict[str, dict[str, float]] = {}

    def run(what: str, batch: int) -> Case:
        case = Case(plan.shape.name, what, batch)
        cases[case.name], rows[case] = _spawn(case, prefix)
        return case

    for batch in plan.batches:
        theirs, ours = run(PEER, batch), run("native", batch)
        agreements[ours.name] = agreement(rows[ours], rows[theirs])
        if batch == plan.batches[0]:
            plain = run("reference", batch)
            agreements[plain.name] = agreement(rows[plain], rows[ours])
            if plan.drop_in is not None:
                swapped = run(DROP_IN, batch)
                agreements[swapped.name] = agreement(rows[swapped], rows[theirs])
        del rows[theirs]
    if not plan.batches:
        run("native", 0)
    found = Compared(plan, cases, agreements, [])
    if found.right:
        found.verdicts = list(_verdicts(found, rate))
    return found


def _unsure(*timed: Traced) -> str:
    """What to say of times taken while other processes kept more than a fifth of a core busy."""
    return ", NOT TO BE TRUSTED, the machine was busy" if any((t.others or 0) > 0.2 for t in timed) else ""


def _verdict(what: str, got: float, bound: float, text: str, most: bool = False) -> str:
    met = got <= bound if most else got >= bound
    limit = text.format(bound)
    return f"{what}: {text.format(got)} ({'<=' if most else '>='} {limit}: {'met' if met else 'MISSED'})"


def _verdicts(found: Compared, rate: float) -> list[str]:
    plan, cases = found.plan, found.cases
    name = plan.shape.name
    out: list[str] = []
    for i, batch in enumerate(plan.batches):
        theirs, ours = (cases[Case(name, what, batch).name] for what in (PEER, "native"))
        least = plan.least[i] if i < len(plan.least) else 0.0
        out.append(
            _verdict(f"{ours.what} over {PEER}", theirs.median / ours.median, least, "{:.1f}x") + _unsure(theirs, ours)
        )
    first = plan.batches[0] if plan.batches else 0
    ours = cases[Case(name, "native", first).name]
    if plan.reference is not None:
        plain = cases[Case(name, "reference", first).name]
        out.append(
            _verdict(f"{ours.what} over reference", plain.median / ours.median, plan.reference, "{:.2f}x")
            + _unsure(plain, ours)
        )
    if plan.drop_in is not None:
        theirs, swapped = (cases[Case(name, what, first).name] for what in (PEER, DROP_IN))
        ratio = theirs.median / swapped.median
        out.append(_verdict(f"{DROP_IN} over {PEER}", ratio, plan.drop_in, "{:.1f}x") + _unsure(theirs, swapped))
    if plan.rate is not None:
        out.append(
            _verdict(f"{ours.what}, sweep of the matrix rate", ours.of_rate(rate) or 0, plan.rate, "{:.0%}")
            + _unsure(ours)
        )
    if plan.phase is not None:
        phase, share = max(((k, v) for k, v in ours.shares().items() if k != "sweep"), key=lambda item: item[1])
        out.append(_verdict(f"{ours.what}, largest other phase ({phase})", share, plan.phase, "{:.0%}", most=True))
    if plan.memory is not None:
        theirs = cases[Case(name, PEER, first).name]
        if ours.peak and theirs.peak:
            share = ours.peak / theirs.peak
            out.append(_verdict(f"{ours.what}, peak memory of the peer's", share, plan.memory, "{:.0%}", most=True))
    if not plan.batches and ours.peak:
        out.append(_verdict(f"{ours.what}, peak memory", ours.peak / 1e9, MEMORY_4K / 1e9, "{:.2f} GB", most=True))
    return out


HEADER = (
    "case", "runs", "median s", "spread s", "peer over ours", "phases", "sweep of matrix rate", "peak GB",
    "over start GB", "certificate", "same active / chosen / rows off", "load/others",
)  # fmt: skip


def _gigabytes(value: int | None, less: int | None = 0) -> str:
    return "-" if value is None or less is None else f"{(value - less) / 1e9:.2f}"


def _line(found: Compared, t: Traced, rate: float) -> tuple[str, ...]:
    peer = found.cases.get("/".join([found.plan.shape.name, PEER, *t.what.split("/")[2:]]))
    ratio = f"{peer.median / t.median:.1f}x" if peer and peer is not t and found.right else "-"
    agreed = found.agreements.get(t.what)
    agreed_text = f"{agreed['active']:.4%} / {agreed['chosen']:.2%} / {agreed['rows']:.1e}" if agreed else "-"
    certificate = "-" if t.certificate is None else f"{t.certificate:.1e}"
    phases, share = (whole_trace.phases(t), whole_trace.shares_of(t, rate)) if t.timings else ("-", "-")
    return (
        t.what, str(len(t.times)), f"{t.median:.2f}", f"{t.spread:.2f}", ratio, phases, share, _gigabytes(t.peak),
        _gigabytes(t.peak, t.base), certificate, agreed_text, whole_trace.busy(t),
    )  # fmt: skip


def markdown(found: list[Compared], rates: machine_rates.Rates) -> str:
    facts = machine_rates.facts()
    lines = [
        "# Against circuit-tracer 0.5.0 (the package, a fork of upstream's v0.4.1)",
        "",
        "Written by `make bench-peers`; do not edit. circuit-tracer 0.5.0 and pycircuit with the same weights, targets",
        "and rounds, float32, every case in a process of its own, after a warm-up on eight tokens. A",
        "ratio is given only where both chose the same features (99%: float32 decides ties) and their rows agree to",
        "1e-4 of the norm (the reference's are held against the native ones). So that they can be compared ours leaves",
        "out the errors of the first position, as the peer does; the certificate is of another run with all of them.",
        "*drop-in*: the peer's own model and transcoders, and its `Graph`, by pycircuit.integrations.circuit_tracer.",
        "Peak memory is what the first timed run reached, in all and over what was resident before it. *sweep of",
        "matrix rate*: causal-cone operations without and with the first hop, over the best matrix rate measured here.",
        "",
        f"- torch {facts['torch']}, Python {facts['python']}, {facts['cpu']}, {facts['cores']} cores",
        f"- {rates}",
    ]  # fmt: skip
    lines += [f"- {verdict}" for one in found for verdict in one.verdicts]
    lines += [f"- {one.plan.shape.name}: WRONG, no ratio: {one.agreements}" for one in found if not one.right]
    table = [_line(one, t, rates.float32) for one in found for t in one.cases.values()]
    return "\n".join([*lines, "", *whole_trace.markdown_table(HEADER, table)]) + "\n"


def _as_json(found: list[Compared], rates: machine_rates.Rates) -> dict[str, Any]:
    shapes = {
        one.plan.shape.name: {
            "cases": [t.as_json() for t in one.cases.values()],
            "agreements": one.agreements,
            "verdicts": one.verdicts,
        }
        for one in found
    }
    return {"machine": machine_rates.facts(), "rates": machine_rates.as_json(rates), "shapes": shapes}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks/peers.py", description=__doc__)
    parser.add_argument("--shape", choices=list(PLANS), action="append", help="only this one; tiny tries the script")
    parser.add_argument("--prefix", default="", help="a command to run each case under, for example 'taskset -c 0,1'")
    parser.add_argument(
        "--json", type=Path, help="where everything goes; default results/peers-cpu.json for all shapes"
    )
    parser.add_argument("--markdown", type=Path, help="whose section to write; default RESULTS.md for all shapes")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    given = _parser().parse_args()
    if given.case:
        run_case(Case(given.case[0], given.case[1], int(given.case[2])), given.out)
        return 0
    names = given.shape or [name for name in PLANS if name != "tiny"]
    rates = machine_rates.measure(THREADS)
    found = [compare(PLANS[name], rates.float32, shlex.split(given.prefix)) for name in names]
    text = markdown(found, rates)
    print(text)
    whole = given.shape is None
    into, results = given.markdown, given.json
    if whole:
        into, results = into or HERE / "RESULTS.md", results or HERE / "results" / "peers-cpu.json"
    if results:
        results.write_text(json.dumps(_as_json(found, rates), indent=1) + "\n")
    if into:
        sections.put(into, "peers", text)
    return 0 if all(one.right for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
