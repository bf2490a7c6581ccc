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


def test_progress_names_the_phase_and_the_rate() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, mark in ((Terminal(), "\r"), (io.StringIO(), "pycircuit: ")):
        progress = Progress(True, stream)
        progress.step("sweep", 0, 50)
        assert not stream.getvalue()  # a short run is silent
        progress.next = 0.0
        progress.phase_begin -= 2.0
        progress.step("sweep", 10, 50)
        progress.close()
        text = stream.getvalue()
        assert text.startswith(mark) and "sweep: 10 of 50 rows, 5 rows/s, 8 s left" in text and text.endswith("\n")


def test_progress_must_be_something() -> None:
    with pytest.raises(TypeError, match="progress must be True, False or a function"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress="yes")
