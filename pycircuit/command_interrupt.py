"""Ctrl-C while the command `pycircuit` imports the package: one line and an exit code instead of a traceback.

`pycircuit/__init__.py` imports this module first. A program that imports pycircuit is left alone. Meanwhile nothing
collects garbage: collections would look through the imported modules, which stay, for a sixth of the time.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

MESSAGE = "pycircuit: stopped"
EXIT_CODE = 130


class Stopped(Exception):
    """Ctrl-C; the message says how to continue."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Exit at once: nothing has been computed yet, and a library could catch an exception."""
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(EXIT_CODE)


def _is_command() -> bool:
    """True in the script `pycircuit` and in `python -m pycircuit`."""
    if Path(sys.argv[0]).stem == "pycircuit":
        return True
    return sys.argv[0] == "-m" and "pycircuit" in sys.orig_argv


def begin() -> None:
    """Install the handler, if this is the command and Python's own handler is in place, and stop collections."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
        gc.disable()


def end() -> None:
    """Put Python's handler back: Ctrl-C raises KeyboardInterrupt again. Collections begin."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.enable()


begin()
