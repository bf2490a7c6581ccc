"""Tests of the drop-in for circuit-tracer: models stay as they are, threads, weights, probes."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import pair
import pytest
import torch
from drop_in_cases import FEW, POSITIONS, SETTINGS, SIZE, ids, made, plain, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pycircuit.integrations import circuit_tracer as drop_in
from pycircuit.integrations.circuit_tracer import (
    attribute,
    transcoder_weights,
    transformer_lens,
)
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import FileRows


@FEW
def test_a_model_is_as_it_was(where: str) -> None:
    """Nothing is left on it: its own attribute gives the very same graph after ours."""
    model = made(where, "clt")
    before = pair.trace_circuit_tracer(model, ids(), **SETTINGS)
    attribute(ids(), model, **SETTINGS)
    after = pair.trace_circuit_tracer(model, ids(), **SETTINGS)
    assert torch.equal(before.adjacency_matrix, after.adjacency_matrix)


class Copies(TorchDispatchMode):
    """Counts the copies of matrices of one shape, turned."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.clone.default and out.shape == self.shape
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_of_their_mlps_are_not_copied_to_be_turned(dtype: torch.dtype) -> None:
    """In half precision they are: there the layout decides how sums are rounded, and with them which features fire."""
    model = made("lens llama", "plt", dtype=dtype)
    attribute(ids(), model, **SETTINGS)  # probes the model
    weight = model.blocks[0].mlp.old_mlp.W_in
    before = model(ids())
    with Copies(weight.T.shape) as copies:
        attribute(ids(), model, **SETTINGS)
    assert (copies.count == 0) == (dtype == torch.float32)
    with Copies(weight.T.shape) as copies:
        assert torch.equal(model(ids()), before)
    assert copies.count > 0, "TransformerLens does not copy any more: take this out of transformer_lens.py"


def modes(model: Any) -> list[tuple[str, bool]]:
    return [(name, m.training) for name, m in getattr(model, "_module", model).named_modules()]


def hooks(model: Any) -> list[tuple[int, int]]:
    modules = getattr(model, "_module", model).modules()
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


@FEW
def test_a_model_is_as_it_was_after_an_error_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(where, "plt")
    before = modes(model), hooks(model)
    wanted = attribute(ids(), model, **SETTINGS).adjacency_matrix
    assert (modes(model), hooks(model)) == before
    mlp = model.blocks[0].mlp.old_mlp if "lens" in where else model._module.model.layers[0].mlp
    for name, of, error in (("forward", type(mlp), KeyboardInterrupt), ("_graph", drop_in.attribution, MemoryError)):
        with monkeypatch.context() as broken:
            broken.setattr(of, name, partial(failing, error))
            with pytest.raises(error):
                attribute(ids(), model, **SETTINGS, offload="disk")
        assert (modes(model), hooks(model)) == before
        assert torch.equal(attribute(ids(), model, **SETTINGS).adjacency_matrix, wanted)


def failing(error: type[BaseException], *args: Any, **kwargs: Any) -> None:
    raise error


@FEW
def test_threads_may_trace_side_by_side(where: str) -> None:
    models = made(where, "plt"), made(where, "clt")
    wanted = [attribute(ids(), model, **SETTINGS).adjacency_matrix for model in models]
    with ThreadPoolExecutor(4) as pool:
        matrices = list(
            pool.map(lambda index: attribute(ids(), models[index % 2], **SETTINGS).adjacency_matrix, range(16))
        )
    assert all(torch.equal(graph, wanted[index % 2]) for index, graph in enumerate(matrices))


@FEW
def test_in_modes_without_gradients(where: str) -> None:
    """circuit-tracer's own function needs gradients; pycircuit's does not."""
    model = plain(where)
    wanted = attribute(ids(), model, **SETTINGS).adjacency_matrix
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            graph = attribute(ids(), model, **SETTINGS)
        assert torch.equal(graph.adjacency_matrix, wanted)
    same(pair.trace_circuit_tracer(model, ids(), **SETTINGS), attribute(ids(), model, **SETTINGS))


@pytest.mark.parametrize("nothing", ["", False])
def test_offload_may_be_anything_false(nothing: Any) -> None:
    graphs = [attribute(ids(), plain("lens llama"), **SETTINGS, offload=o) for o in (None, nothing)]
    assert torch.equal(graphs[0].adjacency_matrix, graphs[1].adjacency_matrix)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("where", ["lens llama", "nnsight llama", "nnsight gemma3"])
def test_offloaded_modules_come_back(where: str, offload: Any) -> None:
    model = made(where, "plt_topk_skip")
    plainly, offloaded = attribute(ids(), model, **SETTINGS), attribute(ids(), model, **SETTINGS, offload=offload)
    assert torch.equal(plainly.adjacency_matrix, offloaded.adjacency_matrix)
    module = getattr(model, "_module", model)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert torch.equal(attribute(ids(), model, **SETTINGS).adjacency_matrix, plainly.adjacency_matrix)


def test_progress_is_seen_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.progress._INTERVAL", {True: 0.0, False: 0.0})
    attribute(ids(), plain("lens llama"), **SETTINGS)
    assert not capsys.readouterr().err
    attribute(ids(), plain("lens llama"), **SETTINGS, verbose=True)
    assert "sweep: 0 of" in capsys.readouterr().err


# Weights


@pytest.mark.parametrize("kind", ["plt_topk_skip", "clt_relu_skip"])
@FEW
def test_their_transcoders_are_not_copied(where: str, kind: str) -> None:
    model = plain(where, kind)
    ours, module = transcoder_weights.transcoders_of(model), getattr(model.transcoders, "_module", model.transcoders)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for entries in (ours.w_enc, ours.b_enc, ours.w_dec, ours.b_dec, ours.w_skip):
        assert {t.untyped_storage().data_ptr() for t in entries} <= own


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_what_is_in_files_stays_there(kind: str, tmp_path: Path) -> None:
    ours = transcoder_weights.transcoders_of(made("lens llama", kind, tmp_path, "lazy"))
    assert all(isinstance(t, FileRows) for t in ours.w_dec)
    pages = Path("/proc/self/maps").read_text()
    assert pages.count(str(tmp_path)) >= SIZE.layers  # encoders are read from their files' pages
    del ours
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that a model is put to the test."""
    seen: list[str] = []

    def counted(own: Any) -> Any:
        return lambda *args: (seen.append("probe"), own(*args))[1]

    for of in (transformer_lens, ReplacementModel):
        monkeypatch.setattr(of, "_probe", counted(of._probe))
    return seen


@FEW
def test_a_model_is_put_to_the_test_once_for_its_weights(where: str, probes: list[str]) -> None:
    model = made(where, "plt")
    weight = model.blocks[1].attn.W_O if "lens" in where else model._module.model.layers[1].self_attn.o_proj.weight
    for _ in range(3):
        attribute(ids(), model, **SETTINGS)
    assert len(probes) == 1
    with torch.no_grad():
        weight.mul_(1.5)
    attribute(ids(), model, **SETTINGS)
    assert len(probes) == 2
    weight.data = weight.data.clone()
    attribute(ids(), model, **SETTINGS)
    assert len(probes) == 3


@FEW
def test_no_change_of_weights_makes_a_graph_stale(where: str) -> None:
    """One through `.data` leaves no trace that torch would count."""
    model = made(where, "plt")
    before = attribute(ids(), model, **SETTINGS).adjacency_matrix
    if "lens" in where:
        model.blocks[1].attn._W_V.data.mul_(-1.5)
    else:
        model._module.model.layers[1].self_attn.v_proj.weight.data.mul_(-1.5)
    ours = pair.by(attribute, model, ids(), **SETTINGS)
    same(ours, pair.trace_circuit_tracer(model, ids(), **SETTINGS))
    assert ours.adjacency_matrix.shape != before.shape or not torch.allclose(ours.adjacency_matrix, before, atol=1e-3)


def test_a_model_that_is_wired_anew_is_put_to_the_test_again(probes: list[str]) -> None:
    model = made("lens llama", "plt")
    attribute(ids(), model, **SETTINGS)
    model.blocks[1].hook_attn_out.add_hook(lambda acts, hook: 2 * acts, is_permanent=True)
    with pytest.raises(ValueError, match=r"attention .* off"):
        attribute(ids(), model, **SETTINGS)
    assert len(probes) == 2


def test_a_forward_in_another_thread_does_not_enter_the_graph() -> None:
    """An application runs the model while it is traced, here between two layers of the trace's own forward."""
    model, other = made("lens llama", "plt"), pair.prompt(POSITIONS, SIZE.vocabulary, seed=9)
    wanted, answer = attribute(ids(), model, **SETTINGS), model(other[None])
    answers: list[Tensor] = []

    def application(_: Any, args: Any, out: Tensor) -> None:
        if get_ident() == main:
            thread = Thread(target=lambda: answers.append(model(other[None])))
            thread.start()
            thread.join()

    main, handle = get_ident(), model.blocks[2].hook_resid_pre.register_forward_hook(application)
    try:
        graph = attribute(ids(), model, **SETTINGS)
    finally:
        handle.remove()
    assert torch.equal(graph.adjacency_matrix, wanted.adjacency_matrix)
    assert len(answers) >= 1 and all(torch.equal(got, answer) for got in answers)


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    """Its parts are put to the test first: here attention's output is changed on its way to the stream."""
    model = made("lens llama", "plt")
    model.blocks[1].hook_attn_out.add_hook(lambda acts, hook: 2 * acts, is_permanent=True)
    with pytest.raises(ValueError, match=r"attention .* off"):
        attribute(ids(), model)
