"""Progress of a long run: one line that is rewritten in a terminal, or a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

Report = Callable[[str, int, int], None]  # phase, done, total

_FIRST_LINE = 1.0  # seconds before the first line in a terminal
_INTERVAL = {True: 0.1, False: 10.0}  # seconds between two lines, in a terminal and in a log


class Progress:
    """A counter of work by phase. show: True writes to stderr, False is silent, a function is called at every step."""

    def __init__(self, show: bool | Report, stream: TextIO | None = None) -> None:
        if not isinstance(show, bool) and not callable(show):
            raise TypeError(
                f"progress must be True, False or a function (phase, done, total), got {type(show).__name__}"
            )
        self.report = None if isinstance(show, bool) else show
        self.stream = (stream or sys.stderr) if show is True else None
        self.start = self.phase_begin = time.perf_counter()
        self.terminal = getattr(self.stream, "isatty", bool)()  # streams of notebooks and loggers may lack it
        self.next = self.start + (_FIRST_LINE if self.terminal else _INTERVAL[False])
        self.open = False

    def step(
        self, phase: str, done: int, total: int, unit: str = "rows", note: Callable[[], str] | None = None
    ) -> None:
        """Report `done` of `total` in this phase; zero begins it. note: more text, called only if a line is due."""
        now = time.perf_counter()
        if not done:
            self.phase_begin = now
        if self.report is not None:
            self.report(phase, done, total)
        if self.stream is None or now < self.next:
            return
        self.next = now + _INTERVAL[self.terminal]
        spent = now - self.phase_begin
        rate = f", {done / spent:.3g} {unit}/s, {(total - done) * spent / done:.0f} s left" if done and spent else ""
        self._write(f"{phase}: {done} of {total} {unit}{rate}" + (f", {note()}" if note and done else ""))

    def say(self, line: str) -> None:
        """Write a line now, whatever the interval."""
        if self.stream is not None:
            self._write(line)
            self.close()

    def _write(self, line: str) -> None:
        assert self.stream is not None
        self.stream.write(f"\r\x1b[K{line}" if self.terminal else f"pycircuit: {line}\n")
        self.stream.flush()
        self.open = self.terminal

    def close(self) -> None:
        """End the terminal's line."""
        if self.open and self.stream is not None:
            self.stream.write("\n")
            self.stream.flush()
        self.open = False
