"""Time of the drop-in's `attribute` beside `pc.attribute`, on a short prompt and circuit-tracer's model.

SmolLM2-135M's shape with random weights, ten tokens, 100 features; processor time of one thread, which other programs
do not change. Run it with `make bench-short`.
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
        return pc.attribute(ours, ids, max_features=FEATURES, progress=False)

    active, ours_active = len(drop_in().active_features), len(native().features)
    assert abs(active - ours_active) <= 0.1 * ours_active, (active, ours_active)
    turns = [(seconds(drop_in), seconds(native)) for _ in range(rounds)]
    return (*(statistics.median(t) for t in zip(*turns, strict=True)), statistics.median(a / b for a, b in turns))


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
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
