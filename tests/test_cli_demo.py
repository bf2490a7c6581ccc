"""What a newcomer types: the commands that the pages show on the demo model, and the next thing after them."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import Run, runner

import pycircuit as pc
from pycircuit.demo.demo_model import KINDS
from pycircuit.demo.facts import DATA, facts
from pycircuit.demo.swap import two_hop

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PAGES = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
LINES = sorted(set(re.findall(r"(?:^|`)(pycircuit (?:demo|\w+ demo)\b[^`\n]*)", PAGES, re.M)))
PROMPT = two_hop("Dallas")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    return runner(monkeypatch, capsys)


def test_pages_show_the_demo_to_every_command_that_can_have_it() -> None:
    assert {shlex.split(line)[1] for line in LINES} == {
        "attribute", "intervene", "generate", "estimate", "examples", "demo",
    }  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_commands_of_the_pages_run_as_they_stand(run: Run, line: str, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{two_hop('Chicago')}\n")
    words = shlex.split(line)[1:]
    if words[0] == "intervene" and "--json" not in words:
        words.append("--json")
    done = run(*words)
    assert done.code == 0, done.err
    if words[0] == "intervene":  # and does something worth showing
        told = json.loads(done.out)
        assert max(abs(t["before"] - t["after"]) for t in told["tokens"]) > 0.5
        assert all(e["change"] for e in told["effects"])


@pytest.mark.parametrize("line", [line for line in LINES if "--other" in line])
def test_cities_of_the_pages_swap_their_capitals(run: Run, line: str) -> None:
    words = shlex.split(line)[1:]
    state = facts().state[words[words.index("--other") + 1]]
    assert json.loads(run(*words, "--json").out)["swapped"] == facts().capital[state]


def test_transcoders_of_ones_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'"{two_hop(city)}"\n' for city in list(facts().state)[:20]))
    trained = run("train", "demo", "--texts", "texts.jsonl", "--features", 16, "--k", 2, "--steps", 3, "--batch", 32,
                  "--out", "mine", "--quiet")  # fmt: skip
    assert trained.code == 0, trained.err
    assert run("convert", DATA / "clt", "other", "--to", "pycircuit").code == 0
    for folder in ("mine", "other"):
        done = run("attribute", "demo", PROMPT, "-t", folder, "--json")
        assert done.code == 0 and json.loads(done.out)["targets"][0]["label"] == "Austin", done.err
    assert run("evaluate", "demo", "-t", "mine", "--texts", "texts.jsonl").code == 0
    assert (
        f"a hub id, {' or '.join(map(repr, KINDS))}, got 'none'" in run("attribute", "demo", PROMPT, "-t", "none").err
    )


def test_every_target_asked_for_has_its_tree(run: Run) -> None:
    model = pc.load("demo")
    graph = pc.attribute(model, PROMPT, targets=["Texas", "Austin"], progress=False)
    done = run("attribute", "demo", PROMPT, "--target", "Texas", "--target", "Austin")
    assert done.out.startswith(f"{graph.tree(0)}\n{graph.tree(1)}\n")
    graph = pc.attribute(model, PROMPT, position=[-1, 5], probability=0.5, progress=False)
    done = run("attribute", "demo", PROMPT, "--position", -1, "--position", 5, "--probability", 0.5)
    second = graph.targets.positions.tolist().index(5)
    assert second > 0 and done.out.startswith(f"{graph.tree(0)}\n{graph.tree(second)}\n160 features")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("attribute", "demo", ""), "PROMPT must have at least one token, got ''"),
        (("attribute", "demos", "text"), "did you mean 'demo'?"),
        (("attribute", "./gone", "text"), "load: model must be a folder that exists, got './gone'"),
        (("attribute", "demo", PROMPT, "--target", "Ausitn"), "text must hold words the model knows, got 'Ausitn'"),
        (("attribute", "demo", "text", "--frob"), "See `pycircuit attribute --help`."),
        (("attribute", "demo", "text", "--save", "graph.pt"), "--save must end in .safetensors, got graph.pt"),
        (("attribute", "demo", "text", "--to-json", "graph"), "--to-json must end in .json, got graph"),
        (("attribute", "demo", "text", "--plot", "graph.png"), "--plot must end in .svg, got graph.png"),
        (("attribute", "demo", "text", "--device", "cuda:99"), "device must be one of this machine's, got 'cuda:99'"),
        (("demo", "--plot", "gone/dallas.svg"), "--plot must be in a folder that exists, got gone/dallas.svg"),
        (("demo", "--city", "chicago"), "it knows Chicago"),
        (("intervene", "demo", PROMPT, "--ablate", "Texas", "--layers", "2-3"), "within the model's, range(0, 3), got"),
    ],
)  # fmt: skip
def test_slips(run: Run, args: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done.err
    assert says in done.err and done.err.startswith("pycircuit: ") and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # permissions do not bind root
    for args in (("--save", "g.safetensors"), ("--prompts", "p.txt", "--save", ".")):
        (tmp_path / "p.txt").write_text(PROMPT)
        done = run("attribute", "demo", *([] if "--prompts" in args else [PROMPT]), *args)
        assert done.code == 2 and "--save must be in a folder that can be written to, got ." in done.err


def test_short_help(run: Run) -> None:
    for args in ((), ("attribute",), ("bench", "compare")):
        assert run(*args, "-h") == run(*args, "--help")


def test_a_terminal_without_the_characters_of_a_tree(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii", write_through=True))
    assert run("attribute", "demo", PROMPT).code == 0
    assert held.getvalue().startswith(b"Austin  0.981\n??   +1.69")
