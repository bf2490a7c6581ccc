"""The command line: `pycircuit attribute`, `pycircuit train` and the rest. Nothing else needs typer and rich.

A command's module is imported when the command runs or is described.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pycircuit as pc
from pycircuit import command_interrupt
from pycircuit.command_interrupt import Stopped

from .bundles import bundled

WRONG = 1  # exit code of what could not be done
USAGE = 2  # exit code of wrong arguments
STOPPED = command_interrupt.EXIT_CODE
DEBUG = "--debug"
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer may carry its own click
SENTENCES = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)  # errors with readable messages

# Module, function and example of every command, in the order of the help.
COMMANDS = {
    "attribute": (
        "tracing.attribute",
        "pycircuit attribute demo 'the capital of the state containing Dallas is' --plot dallas.svg",
    ),
    "intervene": (
        "steer.intervene",
        "pycircuit intervene demo 'the capital of the state containing Dallas is' --ablate Texas",
    ),
    "generate": ("steer.generate", "pycircuit generate demo 'the capital of the state of Texas is' --set California=6"),
    "estimate": (
        "tracing.estimate",
        "pycircuit estimate demo 'the capital of the state containing Dallas is' --memory 2GiB",
    ),
    "compare": (
        "compare_graphs.compare",
        "pycircuit compare dallas.safetensors oakland.safetensors --align feature",
    ),
    "train": ("train.train", "pycircuit train smollm2 --texts prose.txt --features 4096 --out transcoders"),
    "export": ("train.export", "pycircuit export transcoders.checkpoint transcoders-so-far"),
    "evaluate": (
        "train.evaluate",
        "pycircuit evaluate smollm2 --transcoders transcoders --texts other.txt --plot figure.svg",
    ),
    "examples": (
        "examples.examples",
        "pycircuit examples smollm2 --transcoders transcoders --texts prose.txt --out graphs",
    ),
    "graph": (
        "graph_command.graph",
        "pycircuit graph dallas.safetensors --paths token/7 target/0 --out dallas.graphml",
    ),
    "inspect": ("transcoders.inspect", "pycircuit inspect transcoders --json"),
    "convert": (
        "transcoders.convert",
        "pycircuit convert mntss/gemma-scope-transcoders mine --to saelens --dtype float32",
    ),
    "serve": ("serve.serve", "pycircuit serve demo --folder graphs"),
    "demo": ("demo_command.demo", "pycircuit demo --plot dallas.svg"),
    "doctor": ("machine_commands.doctor", "pycircuit doctor --json"),
    "benchmark-truth": (
        "benchmark_truth.benchmark_truth",
        "pycircuit benchmark-truth demo --out truth-demo.json",
    ),
    "bench": ("machine_commands.bench_app", "pycircuit bench --op encode --json mine.json"),
}


class Commands(TyperGroup):
    """The commands of the table."""

    def list_commands(self, context: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        path, example = COMMANDS[name]
        module, _, attribute = path.partition(".")
        command = getattr(import_module(f".{module}", __name__), attribute)
        if not isinstance(command, typer.Typer):
            alone = typer.Typer(add_completion=False)
            alone.command(name, epilog=f"Example: {example}")(bundled(command))
            command = alone
        return typer.main.get_command(command)


app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    help=(pc.__doc__ or "").partition("\n")[0],
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(pc.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def command() -> None:
    """Run the command line as a process, which ends without taking its imports apart: with torch that takes 2 s."""
    try:
        main()
    except SystemExit as stop:
        main_thread = threading.main_thread()
        busy = any(not thread.daemon for thread in threading.enumerate() if thread is not main_thread)
        if busy or not isinstance(stop.code, int):
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(stop.code)


def main() -> None:
    """Run the command line: an error is one sentence and an exit code, with its traceback if --debug is given."""
    command_interrupt.end()
    words = sys.argv[1:]
    options = words[: words.index("--")] if "--" in words else words
    debug = DEBUG in options
    for stream in (sys.stdout, sys.stderr):  # a terminal without the characters of a tree shows others instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = [word for word in options if word != DEBUG] + words[len(options) :]
    discarded = _is_discarded()
    try:
        code = app(args=arguments, prog_name="pycircuit", standalone_mode=False)
        if code == STOPPED:  # typer caught the KeyboardInterrupt
            print(command_interrupt.MESSAGE, file=sys.stderr)
    except (KeyboardInterrupt, typer.Abort, Stopped) as stop:
        print(f"{command_interrupt.MESSAGE}{'; ' if str(stop) else ''}{stop}", file=sys.stderr)
        code = STOPPED
    except BrokenPipeError:  # the reader has closed the pipe: `pycircuit doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except SystemExit:  # rich met the closed pipe: it has put the null device into its place
        if discarded or not _is_discarded():
            raise
        code = 0
    except Exception as error:
        if debug:
            raise
        print(f"pycircuit: {_sentence(error)}", file=sys.stderr)
        code = USAGE if isinstance(error, UsageError | ValueError | TypeError | OSError) else WRONG
    sys.exit(code or 0)


def _is_discarded() -> bool:
    """Return True if standard output is the null device."""
    with suppress(OSError, ValueError):
        return os.path.samestat(os.fstat(sys.stdout.fileno()), os.stat(os.devnull))
    return False


def _sentence(error: Exception) -> str:
    """Message of an error in one line."""
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "pycircuit"
        return f"{error.format_message().rstrip('.')}. See `{command} --help`."  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, SENTENCES) and str(error):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {error}; run it again with `pycircuit {DEBUG}` for the traceback"
