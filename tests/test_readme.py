"""Documents: examples run, figures are the committed ones, targets, paths and links exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import formats_table
import pytest

import pycircuit as pc
from pycircuit.ops.registry import OPS
from pycircuit.trace.precision import PRECISIONS
from pycircuit.transcoders.formats import cached_encoder

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/pycircuit/pycircuit/blob/main/"
RAW = "https://raw.githubusercontent.com/pycircuit/pycircuit/main/"
PAGES = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
RECIPES = tuple(f"docs/recipes/{path.name}" for path in sorted((ROOT / "docs/recipes").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", *PAGES, *RECIPES)
PAPERS = ("Ameisen et al. 2025", "Lindsey et al. 2025", "Dunefsky et al. 2024")
EXAMPLES = {
    name: blocks
    for name in DOCUMENTS
    if name not in RECIPES  # tests/test_recipes.py runs them
    if (blocks := re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
}


def results(name: str) -> dict[str, Any]:
    """A committed file of benchmarks/results."""
    report: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / name).read_text())
    return report


def visible_words(markdown: str) -> list[str]:
    """The words of a page that a reader sees; addresses of links are not among them."""
    return [word for word in re.sub(r"\]\([^)]*\)", "]", markdown).split() if re.search(r"\w", word)]


def test_readme_fits_a_screen() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    assert len(visible_words(text)) <= 400


def test_readme_has_an_example() -> None:
    assert "README.md" in EXAMPLES


def test_readme_links_are_absolute() -> None:
    """A package index shows README without the repository around it."""
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert links and all(link.startswith("https://") for link in links)
    assert any(link.startswith(RAW) and link.endswith(".svg") for link in links)


@pytest.mark.parametrize("name", ["README.md", "docs/law.md", "docs/how-it-works.md", "pyproject.toml", "CITATION.cff"])
def test_papers_are_cited(name: str) -> None:
    text = re.sub(r"[()]", "", (ROOT / name).read_text())
    for paper in PAPERS:
        family_name, year = paper.split()[0], paper.split()[-1]
        assert paper in text or (name.endswith(".cff") and f"family-names: {family_name}" in text and year in text)


def test_api_page_has_every_public_name() -> None:
    names = re.findall(r"^::: pycircuit\.(?:\w+\.)*(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(names) == sorted(pc.__all__), "docs/api.md must list the names of pycircuit.__all__, each once"


@pytest.mark.filterwarnings("ignore:Graph.to_json. features or errors must be above layer 0")  # of a tiny random model
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after another, as its reader would run them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(EXAMPLES[name]):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_embedding_page_has_the_ops() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/embedding.md").read_text(), re.M)
    assert tuple(rows) == tuple(OPS)


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("README.md", [("small", "native"), ("long", "native")]),
        ("docs/benchmarks.md", [("small", "native"), ("medium", "native"), ("long", "native"), ("small", "drop-in")]),
    ],
)
def test_figures_against_circuit_tracer(name: str, compared: list[tuple[str, str]]) -> None:
    """Medians of the committed run: the peer's, pycircuit's and their ratio."""
    shapes, text = results("peers-cpu.json")["shapes"], (ROOT / name).read_text()
    for shape, case in compared:
        times = {entry["what"].split("/")[1]: entry["times"] for entry in reversed(shapes[shape]["cases"])}
        peer = statistics.median(times["circuit-tracer"])
        ours = statistics.median(times[case])
        assert re.search(rf"\| {peer:.2f} s.* {ours:.2f} s.* ({peer / ours:.1f})x \|", text), (shape, case)


def test_figures_of_long_prompts_and_lazy_transcoders() -> None:
    median = statistics.median(results("peers-cpu.json")["shapes"]["long4k"]["cases"][0]["times"])
    assert f"{median:.2f} s, " in (ROOT / "docs/benchmarks.md").read_text()
    memory = results("lazy-cpu.json")["shapes"]["full"]["memory"]
    sentence = f"set of {memory['files'] / 1e9:.0f} GB is traced holding {memory['peak'] / 1e9:.1f} GB beside the model"
    assert sentence in (ROOT / "docs/transcoders.md").read_text()


def median_seconds(entry: dict[str, Any]) -> float:
    """The median of a section's runs."""
    return statistics.median(run["seconds"] for run in entry["runs"])


def test_figures_of_the_card() -> None:
    """Medians of the committed run, and the taped algorithm's best batch, extrapolated as the page says."""
    report = results("h200.json")
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/benchmarks.md").read_text()
    plt, clt, long, taped = (report["sections"][name]["results"] for name in ("plt", "clt", "long", "taped"))
    assert not report["dry_run"]
    peer = min(
        entry["setup seconds"] + entry["extrapolated seconds"]["sweep"] + entry["extrapolated seconds"]["rankings"]
        for name, entry in taped.items()
        if name.startswith("taped") and name.endswith("float32")
    )
    ours = median_seconds(plt["gemma2b float32"])
    assert f"| {peer:.1f} s | {ours:.2f} s | {peer / ours:.0f}x |" in page
    assert f"| {peer:.1f} s (its algorithm, extrapolated) | {ours:.2f} s | {peer / ours:.0f}x |" in readme
    assert f"cross-layer transcoder | | {median_seconds(clt['gemma2b-clt float32']):.2f} s |" in page
    ten = plt["gemma2b-ten float32"]
    assert f"every active feature: {ten['runs'][0]['active']:,} | | {median_seconds(ten):.2f} s |" in page
    all_rows, some_rows = long["gemma2b-long float32"]["runs"][0], long["gemma2b-long8k 128 rows again"]
    for shape, run in (("2,300 tokens, 2,048", all_rows), ("8,192 tokens, 128", some_rows)):
        peak = run["peak device bytes"] / 1e9
        assert f"| {shape} features | | {run['seconds']:.2f} s, {peak:.1f} GB |" in page
    fast = median_seconds(plt["gemma2b float32-fast"])
    assert f"whose law holds at 1e-5 too, the first row takes {fast:.2f} s" in page
    first = results("h200-fac47be.json")["sections"]["plt"]["results"]
    assert f"the first took {median_seconds(first['gemma2b float32']):.2f} s for" in page


def test_accuracy_on_the_card() -> None:
    """The largest certificate of each precision, and the largest distance of a row from float32's, as the page says."""
    traces = results("h200.json")["sections"]["plt"]["results"]
    entries = {
        name: [e for key, e in traces.items() if key.endswith(f" {name}") and e.get("runs")] for name in PRECISIONS
    }
    certificates = [max(run["certificate"] for e in entries[name] for run in e["runs"]) for name in PRECISIONS]
    rows = [max(e["agreement"]["largest distance"] for e in entries[name]) for name in list(PRECISIONS)[1:]]
    text = (ROOT / "docs/law.md").read_text()
    assert "certificates were at most {}, {}, {} and {}.".format(*map(short, certificates)) in text
    assert "were at most {}, {} and {} from those".format(*map(short, rows)) in text


def short(number: float) -> str:
    """A number as the page writes it: 4.3e-6."""
    return f"{number:.1e}".replace("e-0", "e-")


def test_what_has_run_on_a_gpu() -> None:
    """The page claims no part that no committed run covers, and does not hide that a section was cut off."""
    page = (ROOT / "docs/benchmarks.md").read_text()
    reports = [results(path.name) for path in sorted((ROOT / "benchmarks/results").glob("h200*.json"))]
    outcomes = {
        test.split("::")[0]: outcome["outcome"]
        for report in reports
        for test, outcome in report["sections"]["tests"]["results"]["outcomes"].items()
    }
    assert set(outcomes.values()) == {"passed"}
    assert not any(subject in test for test in outcomes for subject in ("train", "interven", "generate", "validate"))
    assert all(f"| {subject} | no |" in page for subject in ("training and evaluation", "several GPUs"))
    assert "| interventions, generation, validation | no |" in page
    cut_off = results("h200.json")["sections"]["tests"]["state"].startswith("cut off")
    assert cut_off == ("in the last run the section of tests was cut off" in page)


@pytest.mark.parametrize("name", [*DOCUMENTS, "benchmarks/RESULTS.md"])
def test_documents_say_which_circuit_tracer_is_meant(name: str) -> None:
    """Several packages have the name; docs/circuit-tracer.md tells them apart."""
    text = (ROOT / name).read_text()
    if re.search(r"(?<![`\w/])circuit-tracer(?![.`])", text):
        assert re.search(r"circuit-tracer\W+0\.5\.0\W+(is )?the package", text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)) <= targets
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        page = ROOT / ("README.md" if "://" in link else name)
        local = link.removeprefix(REPOSITORY).removeprefix(RAW)
        assert "://" in local or page.parent.joinpath(local).exists(), link
    for path in re.findall(r"`((?:csrc|kernels|pycircuit|tests|benchmarks|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to see where memory lies")
def test_transcoders_page_has_the_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is what loading and converting finds; `python tests/formats_table.py` writes it anew."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 0)
    assert formats_table.on_the_page() == formats_table.table(tmp_path)
