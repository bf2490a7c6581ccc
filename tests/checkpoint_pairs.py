"""Pairs of processes that start with one checkpoint folder, and kills at any time.

`python checkpoint_pairs.py FOLDER PAIRS SEED` prints how often which outcome was seen, as JSON. Processes are forked
from one that has imported everything, so that two of a pair meet within milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import builders
import torch
from builders import replacement
from trace_helpers import same_graph

import pycircuit as pc
from pycircuit.trace.sweep import Sweep

IDENTICAL = "identical"
REFUSED = "refused"
OTHER_GRAPH = "another graph"
OTHER_ERROR = "another error"
KILLED = "killed"
CODES = (IDENTICAL, REFUSED, OTHER_GRAPH, OTHER_ERROR)


def in_small_tiles() -> None:
    Sweep.fitting = lambda self, layer, *_: min(3, len(layer))  # type: ignore[method-assign]


def trace(folder: Path | None) -> pc.Graph:
    model = replacement("llama", "clt", torch.float32)
    return pc.attribute(model, builders.prompt(), max_features=30, round_size=9, progress=False, checkpoint=folder)


def outcome(folder: Path, expected: pc.Graph) -> str:
    try:
        return IDENTICAL if same_graph(trace(folder), expected) else OTHER_GRAPH
    except pc.CheckpointError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except BaseException:
        traceback.print_exc()
        return OTHER_ERROR


def start(folder: Path, expected: pc.Graph) -> int:
    child = os.fork()
    if not child:
        os._exit(CODES.index(outcome(folder, expected)))
    return child


def end(child: int) -> str:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return KILLED if code == -signal.SIGKILL else CODES[code]


def killed_runs(folder: Path, expected: pc.Graph, random_: random.Random) -> list[str]:
    """Return outcomes of two runs, one or both of which are killed: in the folder's first 50 ms, or at any time."""
    children = [start(folder, expected), start(folder, expected)]
    early = random_.random() < 0.5
    while early and not folder.exists() and not os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.0005)
    time.sleep(random_.uniform(0, 0.05 if early else 0.4))
    for child in random_.sample(children, random_.choice((1, 2))):
        os.kill(child, signal.SIGKILL)
    return [end(child) for child in children]


def pair(folder: Path, expected: pc.Graph, kills: int, random_: random.Random) -> list[str]:
    outcomes = []
    for _ in range(kills):
        outcomes += killed_runs(folder, expected, random_)
    children = [start(folder, expected), start(folder, expected)]
    outcomes += [end(child) for child in children]
    drafts = [name for name in os.listdir(folder) if name.endswith(".partial")]
    return outcomes if not drafts else [*outcomes, f"left {drafts}"]


def main(folder: Path, pairs: int, seed: int) -> None:
    torch.set_num_threads(1)
    in_small_tiles()
    expected, counts = trace(None), Counter[str]()
    for i in range(pairs):
        counts.update(pair(folder / str(i), expected, i % 3, random.Random(seed + i)))
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
