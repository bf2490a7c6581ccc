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
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import torch
from circuit_tracer_cases import CIRCUIT_TRACER, DROP_IN, FAST, INTERVAL, PLANS, Case, Compared, Plan, agreement
from circuit_tracer_report import as_json, markdown, verdicts

import pycircuit as pc
from pycircuit.bench import machine_rates, memory, models, whole_trace
from pycircuit.bench.shapes import Shape
from pycircuit.bench.whole_trace import Traced
from pycircuit.integrations import circuit_tracer
from pycircuit.ops.dispatch import multiplies_bfloat16

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "peers"))


def run_case(case: Case, out: Path, threads: int, rounds: int) -> None:
    """Time one case in this process and save its times and rows."""
    shape = PLANS[case.shape].shape
    traced = Traced(case.shape, case.name, threads, load=machine_rates.load())
    run = run_circuit_tracer if case.what in (CIRCUIT_TRACER, DROP_IN) else run_pycircuit
    rows = run(case, shape, traced, rounds)
    np.savez(out, **rows, traced=json.dumps(traced.as_json()))


def _measure(traced: Traced, call: Any, rounds: int, most_seconds: float) -> Any:
    """Result of the first call; records its memory and the time of up to `rounds` calls, while they are short."""
    traced.base, others = memory.restart_peak(), machine_rates.Others()
    first_result = None
    while not traced.times or (len(traced.times) < rounds and sum(traced.times) < most_seconds):
        result, seconds = whole_trace.clocked(call)
        if not traced.times:
            traced.peak, first_result = memory.peak(), result
        traced.add(seconds, getattr(result, "timings", {}))
    traced.others = others.cores()
    return first_result


def run_pycircuit(case: Case, shape: Shape, traced: Traced, rounds: int) -> dict[str, Any]:
    """Fill in `traced`; the rows to compare, none where the case has no batch."""
    import pair

    model, ids = models.replacement(shape), models.prompt(shape.positions)
    implementation, options = ("native", {"precision": FAST}) if case.what == FAST else (case.what, {})

    def attribute(tokens: torch.Tensor = ids, most: int = shape.targets) -> pc.Graph:
        with pc.use(implementation):
            if not case.batch:
                return pc.attribute(model, tokens, max_features=most, labels=False, progress=False)
            local, seconds = whole_trace.clocked(lambda: pair.without_first_errors(model.freeze(tokens)))
            graph = pair.trace_frozen(model, local, max_features=most, round_size=case.round_size, **options)
        graph.timings["forward"] = seconds + graph.timings.get("forward", 0.0)
        return graph

    attribute(ids[:8], 8)
    graph = _measure(traced, attribute, rounds, 60)
    if case.what != FAST:  # whose products are not of the matrix rate's type
        traced.describe(graph, shape)
    rows = _our_rows(graph) if case.batch else {}
    if case.batch:  # the law holds only with all errors, so it takes another run
        del graph
        with pc.use(implementation):
            graph = pc.attribute(
                model,
                ids,
                max_features=shape.targets or "all",
                round_size=case.round_size,
                labels=False,
                progress=False,
                **options,
            )
    traced.certificate = graph.certificate
    return rows


def _our_rows(graph: pc.Graph) -> dict[str, Any]:
    import pair

    chosen = pair.selected(graph)
    order = torch.argsort(chosen.row_node)
    dense = chosen.to_scipy()[chosen.row_node[order].numpy()].toarray()
    return {
        "active": graph.features.numpy(),
        "selected": chosen.features.numpy(),
        "rows": dense[:, : chosen.first_target],
    }


def run_circuit_tracer(case: Case, shape: Shape, traced: Traced, rounds: int) -> dict[str, Any]:
    """Fill in `traced`; the rows to compare."""
    import pair

    size = pair.Size(
        shape.layers,
        shape.width,
        shape.heads,
        shape.kv_heads,
        shape.head_width,
        models.MLP_FACTOR * shape.width,
        models.VOCABULARY,
        shape.features,
        4096,
    )
    weights = models.transcoder_weights(shape)
    model = pair.circuit_tracer_of("llama", models.language_model(shape), pair.Kind(), weights, size, torch.float32)
    del weights
    ids = models.prompt(shape.positions)

    def attribute(tokens: torch.Tensor = ids, most: int = shape.targets, batch: int = case.batch) -> Any:
        settings = {"batch_size": batch, "update_interval": INTERVAL, "max_feature_nodes": most}
        if case.what == DROP_IN:
            return circuit_tracer.attribute(tokens, model, **settings)
        return pair.trace_circuit_tracer(model, tokens, **settings)

    attribute(ids[:8], 8, 8)
    graph = _measure(traced, attribute, rounds, 15)
    chosen = graph.active_features[graph.selected_features]
    traced.active, traced.rows = len(graph.active_features), len(chosen) + len(graph.logit_targets)
    outputs = len(graph.logit_targets)
    matrix = graph.adjacency_matrix
    rows = torch.cat([matrix[: len(chosen)], matrix[-outputs:]])[:, : len(matrix) - outputs]
    return {"active": graph.active_features.numpy(), "selected": chosen.numpy(), "rows": rows.numpy()}


def _run_in_process(case: Case, options: argparse.Namespace) -> tuple[Traced, dict[str, Any]]:
    """Times and rows of a case that runs in a process of its own."""
    print(f"{case.name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.npz"
        command = [*shlex.split(options.prefix), sys.executable, __file__]
        command += ["--case", case.shape, case.what, str(case.batch), "--out", str(out)]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        subprocess.run(command, check=True)
        with np.load(out) as file:
            arrays = dict(file)
    return whole_trace.from_json(json.loads(str(arrays.pop("traced")))), arrays


def compare(plan: Plan, rate: float, options: argparse.Namespace) -> Compared:
    """All cases of a shape, with verdicts only where they agree; rate: the best matrix rate measured."""
    cases: dict[str, Traced] = {}
    rows: dict[Case, dict[str, Any]] = {}
    agreements: dict[str, dict[str, float]] = {}

    def run(what: str, batch: int) -> Case:
        case = Case(plan.shape.name, what, batch)
        cases[case.name], rows[case] = _run_in_process(case, options)
        return case

    for batch in plan.batches:
        theirs, ours = run(CIRCUIT_TRACER, batch), run("native", batch)
        agreements[ours.name] = agreement(rows[ours], rows[theirs])
        if batch == plan.batches[0]:
            if plan.fast is not None and multiplies_bfloat16():
                fast = run(FAST, batch)
                agreements[fast.name] = agreement(rows[fast], rows[theirs])
            plain = run("reference", batch)
            agreements[plain.name] = agreement(rows[plain], rows[ours])
            if plan.drop_in is not None:
                swapped = run(DROP_IN, batch)
                agreements[swapped.name] = agreement(rows[swapped], rows[theirs])
        del rows[theirs]
    if not plan.batches:
        run("native", 0)
    compared = Compared(plan, cases, agreements, [])
    if compared.right:
        compared.verdicts = verdicts(compared, rate)
    return compared


def parse() -> argparse.Namespace:
    parser = command_line.parser("peers", __doc__, threads=2, rounds=3, shapes=PLANS, results=True)
    parser.add_argument("--prefix", default="", help="a command to run each case under, for example 'taskset -c 0,1'")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.case:
        shape, what, batch = options.case
        run_case(Case(shape, what, int(batch)), options.out, options.threads, options.rounds)
        return 0
    names = options.shape or [name for name in PLANS if name != "tiny"]
    rates = machine_rates.measure(options.threads)
    compared = [compare(PLANS[name], rates.float32, options) for name in names]
    command_line.publish(options, "peers", as_json(compared, rates), markdown(compared, rates))
    return 0 if all(shape.right for shape in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
