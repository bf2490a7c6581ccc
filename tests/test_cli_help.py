"""Help, documented commands, completion, values of options, and wrong arguments."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer
from commands import Run

import pycircuit as pc
from pycircuit import cli
from pycircuit.cli.changes import parse_location
from pycircuit.cli.options import parse_layers, parse_target
from pycircuit.training import Recipe
from pycircuit.training.recipe import HELP

DOCS = Path(__file__).parents[1] / "docs"


def parse(line: str) -> typer.Context:
    """Parse a line as typer does before it runs the command."""
    program, name, *arguments = shlex.split(line)
    assert program == "pycircuit"
    group = typer.main.get_command(cli.app)
    command = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    with command.make_context(name, arguments) as context:
        assert name == "bench" or not context.args
        return context


def shell_lines(text: str) -> list[str]:
    """Commands of pycircuit in the shell blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("pycircuit ")]


@pytest.mark.parametrize(
    "line", shell_lines((DOCS / "command-line.md").read_text() + (DOCS / "transcoders.md").read_text())
)
def test_documented_commands_parse(line: str) -> None:
    parse(line)


def test_every_command_is_documented() -> None:
    lines = shell_lines((DOCS / "command-line.md").read_text())
    assert {shlex.split(line)[1] for line in lines} == set(cli.COMMANDS)


def test_the_recipe_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", (DOCS / "transcoders.md").read_text(), re.M)
    expected = [
        (f.name, "" if f.default is MISSING else f"`{f.default}`", f.metadata[HELP].replace("|", "or"))
        for f in fields(Recipe)
    ]
    assert rows == expected


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example_that_parses(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run(name, "--help")
    match = re.search(r"Example: (pycircuit .*\S)", done.out)
    assert done.code == 0 and match is not None
    context = parse(match[1])
    assert context.info_name == name
    for option in context.command.params:
        assert getattr(option, "help", None), f"{name}: {option.name}"


def test_help_says_how_a_txt_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text for --texts, a prompt a line for --prompts: the help of either option says both."""
    monkeypatch.setenv("COLUMNS", "400")
    lines = run("examples", "--help").out.splitlines()
    texts_help, prompts_help = (
        next(line for line in lines if line.strip("│ ").startswith(option)) for option in ("--texts ", "--prompts ")
    )
    assert ".txt is one text (--prompts reads one a line)" in texts_help
    assert ".txt has one a line (--texts reads a .txt as one text)" in prompts_help
    assert "numbered by line from 1" in prompts_help


def test_completion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PYCIRCUIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "pycircuit at")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().out.split() == ["attribute"]
    for words, completed in (
        ("train --spars", {"--sparsity", "--sparsity-rise"}),
        ("train --kind c", {"clt"}),
        ("train s", {"smollm2"}),
        ("attribute demo --dtype fl", {"float32", "float64", "float16"}),
        ("intervene demo text --freeze a", {"all", "attention"}),
    ):
        monkeypatch.setenv("COMP_WORDS", f"pycircuit {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert set(run().out.split()) == completed


def test_values_of_options() -> None:
    assert parse_location("--set", "3/5/412") == (3, 5, 412)
    assert parse_location("--set", "3/-1/412") == (3, -1, 412)
    assert parse_location("--set", "0/*/7") == (0, None, 7)
    assert parse_location("--set", "0/5:/7") == (0, slice(5, None), 7)
    assert parse_location("--set", "0/:-2/7") == (0, slice(None, -2), 7)
    assert parse_target("id:8941") == 8941 and parse_target("8941") == "8941"
    assert parse_target(" Austin") == " Austin" and parse_target("3/5/412") == pc.Feature(3, 5, 412)
    for text in ("id:-1", "id:x", "id:", "id:1.5"):
        with pytest.raises(ValueError, match=rf"--target must be id: and a number from 0, as in id:8941, got '{text}'"):
            parse_target(text)
    assert parse_layers(None) is None and parse_layers("3-7") == range(3, 8) and parse_layers("4") == range(4, 5)


NO_TEXTS = ("train", "m", "--out", "new", "--features", 40)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("attribute",), "Missing argument"),
        (("attribute", "m", "-t", "s"), "one of PROMPT and --prompts must be given, got neither"),
        (("attribute", "m", "text", "--prompts", "p.txt"), "got both"),
        (("attribute", "demo", "text", "--target", "id:-1"), "--target must be id: and a number from 0, as in id:8941"),
        (("attribute", "m", "text", "--dtype", "int8"), "--dtype must be one of float32"),
        (("attribute", "m", "text", "--implementation", "frob"), "use: name must be one of"),
        (("attribute", "m", "text", "--threads", "0"), "--threads"),
        (("attribute", "m", "text", "--node-threshold", "2"), "node_threshold must be from 0 to 1, got 2"),
        (("attribute", "m", "text", "--save", "gone/g.safetensors"), "--save must be in a folder that exists"),
        (("attribute", "m", "text", "--plot", "."), "--plot must be a file, got the folder ."),
        (("attribute", "m", "x,y", "--ids"), "must be token ids such as 5,17,42, got 'x,y'"),
        (("attribute", "m", "text"), "load: transcoders must be a folder"),
        (("attribute", "./gone", "text", "-t", "./gone"), "./gone"),
        (("estimate", "m", "text"), "load: transcoders must be a folder"),
        (("intervene", "m", "text"), "one of --set, --scale and --ablate must be given"),
        (("intervene", "m", "text", "--set", "3/5/4"), "FEATURE=NUMBER or LABEL=NUMBER, got '3/5/4'"),
        (("intervene", "m", "text", "--set", "3:5:4=1"), "--set must be LAYER/POSITION/FEATURE such as 3/5/412"),
        (("intervene", "m", "text", "--scale", "3/5/4=x"), "--scale must be LAYER/POSITION/FEATURE=NUMBER or LABEL"),
        (("intervene", "m", "text", "--ablate", "3/5"), "--ablate must be LAYER/POSITION/FEATURE such as"),
        (("intervene", "m", "text", "--ablate", "3/5/4", "--layers", "7-3"), "--layers must be the first and"),
        (("intervene", "m", "text", "--ablate", "3/5/4", "--freeze", "x"), "--freeze must be one of all, attention"),
        (("intervene", "m", "text", "--ablate", "3/5/4", "--effect", "3/*/4"), "--effect must name one position"),
        (NO_TEXTS, "one of --texts and --preset must be given, got neither"),
        (("train", "m", "--texts", "t.txt", "--out", "new"), "--features must be given"),
        (("train", "m", "--texts", "t.txt", "--features", 40), "--out must be given"),
        ((*NO_TEXTS, "--k", 41), "train: k must be at most the 40 features, got 41"),
        ((*NO_TEXTS, "--kind", "frob"), "train: kind must be one of plt, clt, got 'frob'"),
        (("train", "--texts", "t.txt", "--out", "new", "--features", 40), "one of MODEL and --preset must be given"),
        (("train", "--preset", "frob", "--out", "new"), "--preset must be one of smollm2, got 'frob'"),
        (("evaluate", "m", "-t", "s"), "one of --texts and --preset must be given, got neither"),
    ],
)  # fmt: skip
def test_wrong_arguments(run: Run, args: tuple[str, ...], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert says in done.err and done.err.startswith("pycircuit: ") and done.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.txt"]


def test_debug_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("--debug", "attribute", "m", "text"), ("attribute", "m", "text", "--debug")):
        monkeypatch.setattr(sys, "argv", ["pycircuit", *arguments])
        with pytest.raises(ValueError, match="transcoders must be"):
            cli.main()
