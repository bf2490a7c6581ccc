"""Progress lines of long runs."""

from __future__ import annotations

import io

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc
from pycircuit.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("pycircuit.progress.time.perf_counter", lambda: self.now)


def test_progress_names_the_phase_and_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, mark in ((Terminal(), "\r"), (io.StringIO(), "pycircuit: ")):
        progress = Progress(True, stream)
        progress.step("sweep", 0, 50)
        assert not stream.getvalue()  # a short run is silent
        progress.next = 0.0
        clock.now += 2.0
        progress.step("sweep", 10, 50)
        progress.close()
        text = stream.getvalue()
        assert text.startswith(mark) and "sweep: 10 of 50 rows, 5 rows/s, 8 s left" in text and text.endswith("\n")


def test_the_time_left_is_estimated_from_recent_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow beginning, and what a resumed run did before, are not in the rate; another phase between changes none."""
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = Progress(True, stream)
    progress.step("training", 1000, 5000, "tokens")  # resumed
    assert progress.rate("training") is None
    for count in range(100):
        clock.now += 60.0
        progress.step("training", 1000 + count, 5000, "tokens")
    for count in range(200):
        clock.now += 1.0
        progress.step("activations", count, 200)
        clock.now += 1.0
        progress.step("training", 1100 + 4 * count, 5000, "tokens")
    assert progress.rate("training") == pytest.approx(2.0, rel=0.05)
    assert stream.getvalue().splitlines()[-1].startswith("pycircuit: ")
    assert len(progress.recent["training"]) < 100


def test_progress_must_be_something() -> None:
    with pytest.raises(TypeError, match="progress must be True, False or a function"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress="yes")
