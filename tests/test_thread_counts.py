"""More threads than the system can start would end a process without a word: an error comes first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc
from pycircuit.bench.__main__ import thread_counts
from pycircuit.ops import threads


@pytest.fixture
def many_threads() -> Iterator[int]:
    before, count = torch.get_num_threads(), threads.most_threads() + 1
    yield count
    torch.set_num_threads(before)


def test_threads_of_the_command_line_are_bounded() -> None:
    """In a process of its own: without the rule it dies of a signal, or hangs."""
    command = "from pycircuit.cli import main; main()"
    words = ["attribute", "demo", "a prompt", "--threads", "100000"]
    run = subprocess.run([sys.executable, "-c", command, *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert f"--threads must be from 1 to {threads.most_threads()}" in run.stderr and "got 100000" in run.stderr


def test_threads_of_bench_are_bounded(many_threads: int) -> None:
    with pytest.raises(ValueError, match=f"bench: --threads must be from 1 to .*got {many_threads}"):
        thread_counts(f"1,{many_threads}")


def test_threads_of_torch_are_bounded(many_threads: int) -> None:
    """torch starts none before the first loop, so that its number may still be refused."""
    model = replacement("llama", "plt", torch.float32)
    torch.set_num_threads(many_threads)
    for call in (pc.attribute, pc.estimate):
        with pytest.raises(ValueError, match=rf"{call.__name__}: torch.get_num_threads\(\) must be from 1 to"):
            call(model, builders.prompt())
    with pytest.raises(ValueError, match=r"ReplacementModel: torch.get_num_threads\(\) must be"):
        pc.ReplacementModel(model.hf_model, model.transcoders)
