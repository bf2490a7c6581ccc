"""The op tour: each op once on a realistic input, in a few seconds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pycircuit.ops.dispatch import Request, plan
from pycircuit.ops.registry import OPS

from . import machine_rates
from .catalog import select
from .machine_rates import Rates
from .runner import Options, Result, measure

STOPS = {
    "encode": ("encode/small/jumprelu", "64 tokens to 8,192 features, 32 active at each"),
    "decode": ("decode/small/clt8", "2,048 active features to 8 layers"),
    "attend_back": ("attend_back/small/b64-ragged-stored", "64 gradients through 8 frozen heads"),
    "edge_scores": ("edge_scores/small/b64-plt", "64 gradients against 2,048 active features"),
    "influence": ("influence/small/k1024", "1,024 edge rows over 16,960 sources"),
}


def tour(rates: Rates) -> Iterator[tuple[str, str, Result]]:
    """(op, what it is given, how it went), op by op, by the implementation that would run on this machine."""
    for op in OPS:
        name, input_words = STOPS[op]
        chosen = plan(Request(op, "cpu", (torch.float32,)))
        options = Options(chosen.implementation, chosen.isa, budget=0.15)
        (row,) = (r for r in select(op=op) if r.name == name)
        yield op, input_words, measure(row, machine_rates.all_threads(), rates, options)
