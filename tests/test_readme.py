"""What the documents say is true: examples run, targets exist, paths and links lead somewhere."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import formats_table
import pytest

from pycircuit.ops.registry import OPS
from pycircuit.transcoders.formats import cached_encoder

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
EXAMPLES = {
    name: blocks
    for name in DOCUMENTS
    if (blocks := re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
}


def test_readme_has_an_example() -> None:
    assert "README.md" in EXAMPLES


@pytest.mark.filterwarnings("ignore:Graph.to_json. features or errors must be above layer 0")  # of a tiny random model
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after another, as its reader would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(EXAMPLES[name]):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_page_has_the_ops() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/embedding.md").read_text(), re.M)
    assert tuple(rows) == tuple(OPS)


def test_readme_has_the_figures_that_were_measured() -> None:
    """Medians of the committed run: the peer's, ours and their ratio."""
    shapes = json.loads((ROOT / "benchmarks/results/peers-cpu.json").read_text())["shapes"]
    text = (ROOT / "README.md").read_text()
    compared = [(shape, "native") for shape in ("small", "medium", "long")] + [("small", "drop-in")]
    for shape, what in compared:
        cases = {case["what"].split("/")[1]: case["times"] for case in reversed(shapes[shape]["cases"])}
        peer, ours = statistics.median(cases["circuit-tracer"]), statistics.median(cases[what])
        row = re.search(rf"\| {peer:.2f} s.* {ours:.2f} s.* ({peer / ours:.1f})x \|", text)
        assert row, (shape, what)
    assert f"{statistics.median(shapes['long4k']['cases'][0]['times']):.2f} s, " in text
    held = json.loads((ROOT / "benchmarks/results/lazy-cpu.json").read_text())["shapes"]["full"]["memory"]
    assert f"set of {held['files'] / 1e9:.0f} GB is traced holding {held['peak'] / 1e9:.1f} GB beside the model" in text


def test_readme_has_the_figures_of_the_card() -> None:
    """Medians of the committed run, and the taped algorithm's best batch, extrapolated as it says."""
    text, report = (ROOT / "README.md").read_text(), json.loads((ROOT / "benchmarks/results/h200.json").read_text())
    plt, clt, long, taped = (report["sections"][name]["results"] for name in ("plt", "clt", "long", "taped"))
    assert not report["dry_run"]

    def seconds(entry: dict[str, Any]) -> float:
        return statistics.median(run["seconds"] for run in entry["runs"])

    whole = [
        entry["setup seconds"] + entry["extrapolated seconds"]["sweep"] + entry["extrapolated seconds"]["rankings"]
        for name, entry in taped.items()
        if name.startswith("taped") and name.endswith("float32")
    ]
    ours = seconds(plt["gemma2b float32"])
    assert f"| {min(whole):.1f} s | {ours:.2f} s | {min(whole) / ours:.0f}x |" in text
    assert f"cross-layer transcoder | | {seconds(clt['gemma2b-clt float32']):.2f} s |" in text
    ten = plt["gemma2b-ten float32"]
    assert f"every active feature: {ten['runs'][0]['active']:,} | | {seconds(ten):.2f} s |" in text
    full, part = long["gemma2b-long float32"]["runs"][0], long["gemma2b-long8k 128 rows again"]
    for name, run in (("2,300 tokens, 2,048", full), ("8,192 tokens, 128", part)):
        peak = run["peak device bytes"] / 1e9
        assert f"| {name} features | | {run['seconds']:.2f} s, {peak:.1f} GB |" in text
    first = json.loads((ROOT / "benchmarks/results/h200-fac47be.json").read_text())["sections"]["plt"]["results"]
    assert f"the first of them {seconds(first['gemma2b float32']):.2f} s;" in text


@pytest.mark.parametrize("name", [*DOCUMENTS, "benchmarks/RESULTS.md"])
def test_documents_say_which_circuit_tracer_is_meant(name: str) -> None:
    """Several carry the name; docs/circuit-tracer.md tells them apart."""
    text = (ROOT / name).read_text()
    if re.search(r"(?<![`\w/])circuit-tracer(?![.`])", text):
        assert re.search(r"circuit-tracer\W+0\.5\.0\W+(is )?the package", text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (ROOT / name).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:csrc|kernels|pycircuit|tests|benchmarks|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to see where memory lies")
def test_readme_has_the_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they load here; where it differs, `python tests/formats_table.py` writes it anew."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 0)
    assert formats_table.on_the_page() == formats_table.table(tmp_path)
