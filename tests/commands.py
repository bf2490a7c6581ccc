"""The command line in this process: words in; exit code, output and errors out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from pycircuit import cli


class Done(NamedTuple):
    """Result of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line with its arguments."""

    def call(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["pycircuit", *(str(a) for a in args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Done(stop.value.code, *capsys.readouterr())

    return call
