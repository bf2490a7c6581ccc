"""Time of the drop-in's `attribute` beside `pc.attribute`, and the share of a call that is spent around the sweep.

SmolLM2-135M's shape with random weights, ten tokens, 100 features, on circuit-tracer's model; processor time of one
thread, which other programs do not change. Then `pc.attribute` by phase, there and at 64 tokens with 1,024 features.
Run it with `make bench-short`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import torch

import pycircuit as pc
from pycircuit.integrations.circuit_tracer import attribute
from pycircuit.ops.processor import processor_name

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "peers"))
import pair

SIZE = pair.Size(30, 576, 9, 3, 64, 1536, 49152, 4096, 8192)
KIND = pair.Kind()
ACTIVE, FEATURES, TOKENS = 32, 100, 10
AT_MOST = 1.3  # times the seconds of pc.attribute
LENGTHS = {10: (100, 0.5), 64: (1024, 0.2)}  # tokens: (features, share of the call that may be spent around the sweep)


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def ratio(theirs: Any, ours: pc.ReplacementModel, ids: torch.Tensor, rounds: int) -> tuple[float, float, float]:
    """Median seconds of the drop-in and of pc.attribute, and the median of their ratios, after a call of each."""

    def drop_in() -> Any:
        return attribute(ids, theirs, max_feature_nodes=FEATURES, batch_size=FEATURES)

    def native() -> Any:
        return pc.attribute(ours, ids, max_features=FEATURES, labels=False, progress=False)

    active, ours_active = len(drop_in().active_features), len(native().features)
    assert abs(active - ours_active) <= 0.1 * ours_active, (active, ours_active)
    turns = [(seconds(drop_in), seconds(native)) for _ in range(rounds)]
    return (*(statistics.median(t) for t in zip(*turns, strict=True)), statistics.median(a / b for a, b in turns))


def phases(ours: pc.ReplacementModel, ids: torch.Tensor, features: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds of pc.attribute, and the median shares of its sweep and of the model with its encoders."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        graph = pc.attribute(ours, ids, max_features=features, labels=False, progress=False)
        total = time.perf_counter() - begin
        begin = time.perf_counter()
        ours.freeze(ids)
        times.append((total, graph.timings["sweep"] / total, (time.perf_counter() - begin) / total))
    total, sweep, model = (statistics.median(t) for t in zip(*times[1:], strict=True))
    return total, sweep, model


def print_phases(ours: pc.ReplacementModel, rounds: int) -> bool:
    """Print where the time of a call goes; return True where too much of it goes around the sweep."""
    missed = False
    for tokens, (features, bound) in LENGTHS.items():
        total, sweep, model = phases(ours, pair.prompt(tokens, SIZE.vocabulary), features, rounds)
        missed |= 1 - sweep > bound
        verdict = f"at most {bound:.0%}: {'met' if 1 - sweep <= bound else 'MISSED'}"
        print(
            f"{tokens} tokens, {features} features: {total:.3f} s, around the sweep {1 - sweep:.0%} ({verdict}), of "
            f"which the model and its encoders {model:.0%} and all else {1 - sweep - model:.0%}"
        )
    return missed


def main() -> int:
    options = command_line.parser("short_call", __doc__, threads=1, rounds=9).parse_args()
    torch.set_num_threads(options.threads)
    model = pair.language_model("llama", SIZE, torch.float32)
    weights = pair.transcoder_weights(KIND, SIZE, torch.float32, ACTIVE)
    ours = pc.ReplacementModel(model, pair.our_transcoders(KIND, weights), pair.Tokenizer(SIZE.vocabulary))
    transcoders, ids = (
        pair.circuit_tracer_transcoders(KIND, weights, SIZE, torch.float32),
        pair.prompt(TOKENS, SIZE.vocabulary),
    )
    backends = {
        "TransformerLens": lambda: pair.lens_of("llama", model, transcoders, SIZE, torch.float32),
        "nnsight": lambda: pair.nnsight_of(model, transcoders, SIZE),
    }
    counts = f"{TOKENS} tokens, {FEATURES} features, {options.rounds} rounds"
    print(f"{processor_name()}, {options.threads} threads, {counts}")
    missed = False
    for name, build in backends.items():
        drop_in, native, times = ratio(build(), ours, ids, options.rounds)
        missed |= times > AT_MOST
        verdict = f"at most {AT_MOST}: {'met' if times <= AT_MOST else 'MISSED'}"
        print(f"{name}: drop-in {drop_in:.3f} s, pc.attribute {native:.3f} s, ratio {times:.2f} ({verdict})")
    missed |= print_phases(ours, options.rounds)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
