"""circuit-tracer's pruning, scores and files of its own `Graph`, by itself and by us: the same to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import circuit_tracer
import circuit_tracer.graph
import circuit_tracer.utils
import pair
import pytest
import torch
from graphs import cone_graph
from torch.utils._python_dispatch import TorchDispatchMode

from pycircuit.integrations.circuit_tracer import accelerate

GRAPHS, FILES = sys.modules["circuit_tracer.graph"], sys.modules["circuit_tracer.utils.create_graph_files"]
NAMES = {"prune_graph": GRAPHS, "compute_graph_scores": GRAPHS, "compute_node_influence": GRAPHS,
         "create_graph_files": FILES}  # fmt: skip
OWN = {name: getattr(module, name) for name, module in NAMES.items()}
SHAPES = {"few": (2, 2, 1, 1, 1), "many": (4, 8, 12, 200, 10), "one_target": (3, 5, 4, 30, 1), "none": (2, 3, 1, 0, 2)}
SHARES = [(0.8, 0.98), (0.3, 0.5), (0.97, 0.999), (0.0, 0.0), (1.0, 1.0), (0.8, 1.0)]


@pytest.fixture(autouse=True)
def local_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        @staticmethod
        def from_pretrained(_: Any) -> pair.Tokenizer:
            return pair.Tokenizer(1000)

    monkeypatch.setattr(FILES, "AutoTokenizer", Local)


@pytest.fixture(params=list(SHAPES))
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return built(tmp_path, request.param)


def built(folder: Path, shape: str, seed: int = 0) -> Any:
    ours = cone_graph(*SHAPES[shape], seed=seed)
    ours.to_circuit_tracer(folder / "graph.pt", tokenizer_name="tokenizer", scan="org/tiny")
    return GRAPHS.Graph.from_pt(str(folder / "graph.pt"))


def outcome(call: Callable[[], Any]) -> Any:
    """Result of a call, or its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for pair_of in zip(ours, theirs, strict=True):
            same(*pair_of)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    else:
        assert ours == theirs


def results(graph: Any, shares: tuple[float, float], folder: Path) -> Iterator[Any]:
    """Results of every replaced function, and the bytes of the files."""
    weights = torch.zeros(len(graph.adjacency_matrix))
    weights[-len(graph.logit_targets) :] = graph.logit_probabilities.detach()
    yield outcome(lambda: tuple(GRAPHS.prune_graph(graph, *shares)))
    yield outcome(lambda: GRAPHS.compute_graph_scores(graph))
    yield outcome(lambda: GRAPHS.compute_node_influence(graph.adjacency_matrix, weights))
    shown = {"node_threshold": shares[0], "edge_threshold": shares[1]}
    yield outcome(lambda: FILES.create_graph_files(graph, "tiny", f"{folder}/", **shown))
    yield sorted((path.name, path.read_bytes()) for path in folder.glob("*"))


def compared(graph: Any, shares: tuple[float, float], folder: Path) -> None:
    before = graph.adjacency_matrix.detach().clone()
    theirs = list(results(graph, shares, folder / "theirs"))
    with accelerate():
        assert not any(getattr(module, name) is OWN[name] for name, module in NAMES.items())
        same(tuple(results(graph, shares, folder / "ours")), tuple(theirs))
    same(graph.adjacency_matrix.detach(), before)


def test_accelerate_replaces_pruning_scores_and_files() -> None:
    """Wherever they were imported, as long as it lasts."""
    own = [circuit_tracer.utils.create_graph_files, *OWN.values()]
    with accelerate():
        assert not any(getattr(module, name) is OWN[name] for name, module in NAMES.items())
        assert circuit_tracer.utils.create_graph_files is FILES.create_graph_files
    assert [circuit_tracer.utils.create_graph_files, *(getattr(m, n) for n, m in NAMES.items())] == own


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_masks_scores_and_files_are_theirs(graph: Any, shares: tuple[float, float], tmp_path: Path) -> None:
    """Masks, cumulative scores and influence bit by bit, files byte by byte, replacement and completeness to 1e-6."""
    compared(graph, shares, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_theirs_with_two_threads(seed: int, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        compared(built(tmp_path, "many", seed), SHARES[0], tmp_path)
    finally:
        torch.set_num_threads(1)


def _negative(graph: Any) -> None:
    graph.logit_probabilities = graph.logit_probabilities * torch.tensor([1.0, -1.0] * 5)


def _unsorted(graph: Any) -> None:
    order = torch.randperm(len(graph.selected_features))
    nodes = torch.cat([order, torch.arange(len(order), len(graph.adjacency_matrix))])
    graph.adjacency_matrix = graph.adjacency_matrix[nodes][:, nodes].contiguous()
    graph.selected_features = graph.selected_features[order]


def _other(change: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    def act(graph: Any) -> None:
        graph.adjacency_matrix = change(graph.adjacency_matrix)

    return act


UNUSUAL: dict[str, Callable[[Any], None]] = {
    "negative_weights": _negative,
    "rows_in_another_order": _unsorted,
    "equal_magnitudes": _other(torch.sign),
    "no_edges": _other(torch.zeros_like),
    "one_cycle": _other(lambda matrix: matrix + torch.diag(torch.ones(len(matrix)))),
    "nan": _other(lambda matrix: matrix.index_fill(0, torch.tensor([3]), torch.nan)),
    "infinite": _other(lambda matrix: matrix.index_fill(1, torch.tensor([3]), torch.inf)),
    "columns_first": _other(lambda matrix: matrix.T.contiguous().T),
    "float64": _other(torch.Tensor.double),
    "bfloat16": _other(torch.Tensor.bfloat16),
    "gradient": _other(lambda matrix: matrix.requires_grad_()),
    "no_data": _other(lambda matrix: matrix.to("meta")),
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_an_unusual_graph_comes_to_what_circuit_tracer_makes_of_it(unusual: str, tmp_path: Path) -> None:
    """Numbers and errors are equal: graphs that are not plain go to circuit-tracer's own function."""
    graph = built(tmp_path, "many")
    UNUSUAL[unusual](graph)
    if unusual in ("gradient", "no_data"):  # of which circuit-tracer writes no file
        theirs = outcome(lambda: tuple(GRAPHS.prune_graph(graph)))
        with accelerate():
            same(outcome(lambda: tuple(GRAPHS.prune_graph(graph))), theirs)
    else:
        compared(graph, SHARES[0], tmp_path)


@pytest.mark.parametrize("arguments", [(-0.1, 0.98), (0.8, 1.5), (float("nan"), 0.98)], ids=str)
def test_thresholds_that_are_no_shares_are_circuit_tracers_to_judge(
    arguments: tuple[float, float], tmp_path: Path
) -> None:
    compared(built(tmp_path, "many"), arguments, tmp_path)


def test_files_refuse_what_circuit_tracer_refuses(tmp_path: Path) -> None:
    graph, file = built(tmp_path, "few"), tmp_path / "graph.pt"
    bare = GRAPHS.Graph.from_pt(str(file))
    setattr(bare, "scan" if hasattr(bare, "scan") else "scan_name", None)
    calls: list[tuple[Any, ...]] = [
        (bare, "a", str(tmp_path)),
        (graph, "a", str(file)),
        (graph, "a/b", f"{tmp_path}/"),
    ]
    theirs = [outcome(lambda call=call: FILES.create_graph_files(*call)) for call in calls]
    assert all(error[0] in (ValueError, AssertionError, FileNotFoundError) for error in theirs)
    with accelerate():
        assert [outcome(lambda call=call: FILES.create_graph_files(*call)) for call in calls] == theirs


def test_files_of_a_path_and_of_several_scans(tmp_path: Path) -> None:
    """By position and by name, from a file, with a list of transcoders."""
    built(tmp_path, "many")
    texts = []
    for within, folder in ((nullcontext, "theirs"), (accelerate, "ours")):
        with within():
            FILES.create_graph_files(
                str(tmp_path / "graph.pt"), "tiny", f"{tmp_path}/{folder}/", ["a/one", "b/two"], 0.9
            )
            FILES.create_graph_files(
                slug="other", output_path=f"{tmp_path}/{folder}/", graph_or_path=str(tmp_path / "graph.pt")
            )
        texts.append({path.name: path.read_text() for path in (tmp_path / folder).iterdir()})
    assert texts[0] == texts[1] and len(texts[0]) == 3 and '"b/two"' in texts[0]["tiny.json"]


class Sorts(TorchDispatchMode):
    """Mode that records the length of the longest sort."""

    longest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::sort":
            self.longest = max(self.longest, args[0].numel())
        return func(*args, **(kwargs or {}))


def test_no_sort_of_the_whole_matrix(tmp_path: Path) -> None:
    """Most of circuit-tracer's time goes into it."""
    graph = built(tmp_path, "many")
    nodes = len(graph.adjacency_matrix)
    with Sorts() as own:
        GRAPHS.prune_graph(graph)
    assert own.longest == nodes**2
    with accelerate(), Sorts() as ours:
        GRAPHS.prune_graph(graph)
    assert ours.longest == nodes
