"""Commands of the documents on the demo model, and the slips of a new user."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from commands import Run, runner

import pycircuit as pc
from pycircuit.demo.demo_model import KINDS
from pycircuit.demo.facts import DATA, facts
from pycircuit.demo.swap import two_hop
from pycircuit.transcoders import formats

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PAGES = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
LINES = sorted(set(re.findall(r"(?:^|`)(pycircuit (?:demo|\w+ demo)\b[^`\n]*)", PAGES, re.M)))
PROMPT = two_hop("Dallas")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    return runner(monkeypatch, capsys)


def test_pages_show_every_command_of_a_model_on_the_demo() -> None:
    assert {shlex.split(line)[1] for line in LINES} == {
        "attribute", "intervene", "generate", "estimate", "examples", "demo", "serve",
    }  # fmt: skip


@pytest.mark.parametrize("line", [line for line in LINES if "serve" not in line])  # it runs until it is stopped
def test_commands_of_the_pages_run(run: Run, line: str, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{two_hop('Chicago')}\n")
    words = shlex.split(line)[1:]
    if words[0] == "intervene" and "--json" not in words:
        words.append("--json")
    done = run(*words)
    assert done.code == 0, done.err
    if words[0] == "intervene":  # the change is large enough to show
        printed = json.loads(done.out)
        assert max(abs(token["before"] - token["after"]) for token in printed["tokens"]) > 0.5
        assert all(effect["change"] for effect in printed["effects"])


@pytest.mark.parametrize("line", [line for line in LINES if "--other" in line])
def test_cities_of_the_pages_swap_their_capitals(run: Run, line: str) -> None:
    words = shlex.split(line)[1:]
    state = facts().state[words[words.index("--other") + 1]]
    assert json.loads(run(*words, "--json").out)["swapped"] == facts().capital[state]


def test_own_transcoders_on_the_demo(run: Run, tmp_path: Path) -> None:
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


def test_every_target_has_its_tree(run: Run) -> None:
    model = pc.load("demo")
    graph = pc.attribute(model, PROMPT, targets=["Texas", "Austin"], progress=False)
    done = run("attribute", "demo", PROMPT, "--target", "Texas", "--target", "Austin")
    assert done.out.startswith(f"{graph.tree(0)}\n{graph.tree(1)}\n")
    graph = pc.attribute(model, PROMPT, position=[-1, 5], probability=0.5, progress=False)
    done = run("attribute", "demo", PROMPT, "--position", -1, "--position", 5, "--probability", 0.5)
    second = graph.targets.positions.tolist().index(5)
    assert second > 0 and done.out.startswith(f"{graph.tree(0)}\n{graph.tree(second)}\ninfluence")


def test_views_of_a_graph(run: Run) -> None:
    """Flags of the tree, and the features of most influence below it, with what `intervene` reads."""
    graph = pc.attribute(pc.load("demo"), PROMPT, progress=False)
    done = run("attribute", "demo", PROMPT, "--errors", "--no-group", "--lines", 12, "--plot", "g.svg")
    assert done.out.startswith(graph.tree(errors=True, group=False, max_lines=12) + "\ninfluence")
    listed = [line.split()[:2] for line in done.out.split("\ninfluence")[1].split("\n")[1:11]]
    influence = graph.influence()[: graph.first_error].sort(descending=True, stable=True)
    assert [graph.feature_node(*map(int, name.split("/"))) for _, name in listed] == influence.indices[:10].tolist()
    assert listed[0][0] == f"{100 * float(influence.values[0]):.0f}%"
    assert run("intervene", "demo", PROMPT, "--ablate", listed[1][1]).code == 0


@pytest.mark.parametrize(
    ("args", "message"),
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
        (("attribute", "demo", PROMPT, "--target", "id:-1"), "--target must be id: and a number from 0, as in id:8941"),
        (("inspect", "demo", "--variant", "sae"), "--variant must be one of clt, plt for demo, got 'sae'"),
        (("demo", "--plot", "gone/dallas.svg"), "--plot must be in a folder that exists, got gone/dallas.svg"),
        (("demo", "--city", "chicago"), "it knows Chicago"),
        (("intervene", "demo", PROMPT, "--ablate", "Texas", "--layers", "2-3"), "within the model's, range(0, 3), got"),
    ],
)  # fmt: skip
def test_slips(run: Run, args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done.err
    assert message in done.err and done.err.startswith("pycircuit: ") and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # permissions do not bind root
    for args in (("--save", "g.safetensors"), ("--prompts", "p.txt", "--save", ".")):
        (tmp_path / "p.txt").write_text(PROMPT)
        done = run("attribute", "demo", *([] if "--prompts" in args else [PROMPT]), *args)
        assert done.code == 2 and "--save must be in a folder that can be written to, got ." in done.err


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "cuda:99"])
def test_another_machines_device_is_refused_in_a_sentence(run: Run, device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        return
    done = run("attribute", "demo", PROMPT, "--device", device)
    assert done.code == 2 and f"load: device must be one of this machine's, got {device!r}: " in done.err
    assert len(done.err) < 200 and done.err.count("\n") == 1


def test_inspect_and_convert_take_the_demo(run: Run) -> None:
    for arguments, kind in (((), "clt"), (("--variant", "plt"), "plt")):
        done = run("inspect", "demo", *arguments, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out) == pc.transcoders.inspect(DATA / kind).json()
    assert run("convert", "demo", "mine", "--variant", "plt").code == 0
    assert len(pc.transcoders.load("mine").w_enc) == len(pc.transcoders.load(DATA / "plt").w_enc)


def test_a_folder_of_no_format_is_refused_in_a_short_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("inspect", "empty")
    assert done.code == 2 and all(name in done.err for name in formats.FORMATS)
    assert done.err.endswith("; see docs/transcoders.md\n") and len(done.err) < 450


@pytest.mark.parametrize(
    "command", [("attribute",), ("generate",), ("estimate",), ("examples", "--out", ".")], ids=lambda c: c[0]
)
def test_a_wrong_prompt_is_named_by_its_line(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Counted from 1, blank lines too, as an editor counts."""
    (tmp_path / "p.txt").write_text(f"{PROMPT}\n\nthe capitol of Texas is\n")
    done = run(command[0], "demo", "--prompts", "p.txt", *command[1:])
    assert (done.code, done.out) == (2, "") and "pycircuit: p.txt, line 3: text must hold words" in done.err


def test_short_help(run: Run) -> None:
    for args in ((), ("attribute",), ("bench", "compare")):
        assert run(*args, "-h") == run(*args, "--help")


def test_a_terminal_without_the_characters_of_a_tree(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii", write_through=True))
    assert run("attribute", "demo", PROMPT).code == 0
    assert output.getvalue().startswith(b"Austin  0.992\n??    +6.31")
