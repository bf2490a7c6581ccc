"""Every format: a set with random weights in exactly its layout, next to the same set in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pycircuit as pc
from pycircuit.transcoders import formats
from pycircuit.transcoders.lazy import LazyRows

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WIDTH, SIZE = tiny_models.LAYERS, tiny_models.WIDTH, 24


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


RULES: dict[str, Any] = {
    "relu": lambda g, dtype: pc.ReLU(),
    "jumprelu": lambda g, dtype: [pc.JumpReLU(torch.rand(SIZE, generator=g).to(dtype)) for _ in range(LAYERS)],
    "one_theta": lambda g, dtype: pc.JumpReLU(0.4),
    "topk": lambda g, dtype: pc.TopK(5),
    "topk_negative": lambda g, dtype: pc.TopK(5, keep_negative=True),
    "batchtopk": lambda g, dtype: pc.BatchTopK(0.6),
    "mixed": lambda g, dtype: [pc.ReLU(), pc.JumpReLU(torch.rand(SIZE, generator=g).to(dtype)), pc.TopK(3)],
}


def made(
    cross: bool, rule: str = "jumprelu", skip: bool = True, hole: int | None = None, dtype: torch.dtype = torch.float32,
    reads: str = "mlp_in", writes: str = "mlp_out", bias: bool = True,
) -> Any:  # fmt: skip
    """Random transcoders for tiny_models; skips are far from symmetric."""
    g = torch.Generator().manual_seed(3)

    def each(*shape: int) -> list[Tensor | None]:
        return [None if n == hole else normal(g, *shape, dtype=dtype) for n in range(LAYERS)]

    w_enc, b_enc = each(SIZE, WIDTH), each(SIZE)
    w_enc = [None if w is None else w / WIDTH**0.5 for w in w_enc]
    slots = [(LAYERS - n,) if cross else () for n in range(LAYERS)]
    w_dec = [None if n == hole else normal(g, SIZE, *slots[n], WIDTH, dtype=dtype) for n in range(LAYERS)]
    b_dec = [normal(g, WIDTH, dtype=dtype) for _ in range(LAYERS)] if bias else None
    w_skip = each(WIDTH, WIDTH) if skip else None
    kind = pc.CrossLayerTranscoder if cross else pc.PerLayerTranscoders
    return kind(w_enc, b_enc, w_dec, b_dec, RULES[rule](g, dtype), w_skip, reads, writes)


def dense(w: Any) -> Tensor:
    """A decoder, wherever it is."""
    return w.rows(torch.arange(w.shape[0])).to(w.dtype) if isinstance(w, LazyRows) else w


def same(got: Any, expected: Any) -> None:
    """Every number, the activation's included."""
    assert type(got) is type(expected)
    assert (got.depth, got.reads, got.writes) == (expected.depth, expected.reads, expected.writes)
    for name in ("w_enc", "b_enc", "w_dec", "w_skip"):
        for at, (a, b) in enumerate(zip(getattr(got, name), getattr(expected, name), strict=True)):
            assert (a is None) == (b is None), f"{name} of layer {at}"
            assert a is None or torch.equal(dense(a), dense(b)), f"{name} of layer {at}"
    for at in range(got.depth):
        a, b = got.bias(at), expected.bias(at)
        assert a is b is None or torch.equal(a, torch.zeros_like(a) if b is None else b)


def same_activity(got: Any, expected: Any) -> None:
    """Encode and decode, with pre-activations at the thresholds themselves."""
    g = torch.Generator().manual_seed(8)
    x = normal(g, LAYERS, 6, WIDTH, dtype=torch.float32)
    ours = [got.encode(at, x[at]) for at in range(LAYERS)]
    theirs = [expected.encode(at, x[at]) for at in range(LAYERS)]
    assert sum(f.count for f in theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.row_ptr, b.row_ptr) and torch.equal(a.index, b.index) and torch.equal(a.value, b.value)
    assert torch.equal(got.reconstruct(ours, x), expected.reconstruct(theirs, x))


def same_graph(got: Any, expected: Any, family: str = "gemma2") -> None:
    """All of it, on a family with norms after the MLP and skips on the way."""
    model = tiny_models.build(family)
    graphs = [pc.attribute(pc.ReplacementModel(model, t), tiny_models.prompt(9), max_targets=2) for t in (got, expected)]
    assert len(graphs[1].features) > 10 and graphs[0].certificate < 1e-5
    assert torch.equal(graphs[0].features, graphs[1].features)
    assert torch.allclose(graphs[0].dense(), graphs[1].dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "memory"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_saved_and_loaded(tmp_path: Path, cross: bool, rule: str, lazy: bool) -> None:
    expected = made(cross, rule)
    formats.save(expected, tmp_path / "set", model="tiny")
    got = formats.load(tmp_path / "set", lazy=lazy)
    assert isinstance(got.w_dec[0], LazyRows) == lazy
    same(got, expected)
    same_activity(got, expected)
    same_graph(got, expected)
    for a, b in zip(got.activation, expected.activation, strict=True):
        assert type(a) is type(b)
        assert isinstance(a, pc.JumpReLU) or a == b


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_are_kept_or_converted(tmp_path: Path, cross: bool, dtype: torch.dtype) -> None:
    expected = made(cross, dtype=dtype)
    formats.save(expected, tmp_path / "set")
    got = formats.load(tmp_path / "set")
    assert {t.dtype for t in (*got.w_enc, *got.b_enc, *got.w_skip)} == {dtype}
    same(got, expected)
    for wanted in (torch.float64, torch.float32, torch.bfloat16):
        same(formats.load(tmp_path / "set", dtype=wanted), expected.to(wanted))
        same(formats.load(tmp_path / "set").to(wanted), expected.to(wanted))


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
@pytest.mark.parametrize("hole", [0, 1, 2])
def test_a_layer_without_transcoder_is_saved_as_such(tmp_path: Path, cross: bool, hole: int) -> None:
    expected = made(cross, hole=hole)
    formats.save(expected, tmp_path / "set")
    got = formats.load(tmp_path / "set")
    assert got.w_enc[hole] is None
    same(got, expected)
    same_graph(got, expected)


@pytest.mark.parametrize("reads", ["resid_mid", "mlp_normed", "mlp_in"])
@pytest.mark.parametrize("writes", ["mlp_out", "mlp_raw"])
def test_where_they_read_and_write(tmp_path: Path, reads: str, writes: str) -> None:
    formats.save(made(False, reads=reads, writes=writes), tmp_path / "set")
    got = formats.load(tmp_path / "set")
    assert (got.reads, got.writes) == (reads, writes)


def test_no_bias_is_saved_as_zeros(tmp_path: Path) -> None:
    expected = made(False, bias=False)
    formats.save(expected, tmp_path / "set")
    assert expected.b_dec == [None] * LAYERS
    same(formats.load(tmp_path / "set"), expected)


def test_the_files_are_circuit_tracers(tmp_path: Path) -> None:
    """What FORMATS says of its names, shapes and orientations."""
    plt, clt = made(False, "batchtopk"), made(True)
    formats.save(plt, tmp_path / "plt", model="tiny", scan="there")
    held = load_file(tmp_path / "plt" / "layer_1.safetensors")
    assert set(held) == {"W_enc", "W_dec", "b_enc", "b_dec", "activation_function.threshold", "W_skip"}
    assert torch.equal(held["W_enc"], plt.w_enc[1]) and torch.equal(held["W_skip"], plt.w_skip[1].T)
    assert torch.equal(held["activation_function.threshold"], torch.full((SIZE,), 0.6))
    text = (tmp_path / "plt" / "config.yaml").read_text()
    assert "model_kind: transcoder_set" in text and "feature_input_hook: mlp.hook_in" in text and "scan: there" in text
    formats.save(clt, tmp_path / "clt")
    held = load_file(tmp_path / "clt" / "W_enc_1.safetensors") | load_file(tmp_path / "clt" / "W_dec_1.safetensors")
    assert set(held) == {"W_enc_1", "b_enc_1", "b_dec_1", "threshold_1", "W_skip_1", "W_dec_1"}
    assert torch.equal(held["W_skip_1"], clt.w_skip[1]) and torch.equal(held["W_dec_1"], clt.w_dec[1])


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycircuit.transcoders.formats import writing

    wrote = writing.write_safetensors

    def stops(path: Path, tensors: Any) -> None:
        if path.name == "layer_1.safetensors":
            raise OSError("disk full")
        wrote(path, tensors)

    monkeypatch.setattr(writing, "write_safetensors", stops)
    with pytest.raises(OSError, match="disk full"):
        formats.save(made(False), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    formats.save(made(False), tmp_path / "set")
    with pytest.raises(FileExistsError, match="save: path must be a new folder, got"):
        formats.save(made(False), tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="save: path must be in a folder that exists"):
        formats.save(made(False), tmp_path / "no" / "set")
    with pytest.raises(TypeError, match="save: transcoders must be"):
        formats.save({}, tmp_path / "new")  # type: ignore[arg-type]


def test_lazy_can_be_saved_again(tmp_path: Path) -> None:
    for cross in (False, True):
        expected = made(cross)
        formats.save(expected, tmp_path / f"a{cross}")
        formats.save(formats.load(tmp_path / f"a{cross}"), tmp_path / f"b{cross}")
        same(formats.load(tmp_path / f"b{cross}"), expected)


def circuit_tracer_plt(folder: Path, t: Any, config: str = "", **more: Tensor) -> None:
    """As circuit-tracer writes them."""
    folder.mkdir()
    for at in range(LAYERS):
        held = {"W_enc": t.w_enc[at], "W_dec": t.w_dec[at], "b_enc": t.b_enc[at], "b_dec": t.b_dec[at]}
        if isinstance(t.activation[at], pc.JumpReLU):
            held["activation_function.threshold"] = t.activation[at].theta
        if t.w_skip[at] is not None:
            held["W_skip"] = t.w_skip[at].T.contiguous()
        save_file({**held, **more}, folder / f"layer_{at}.safetensors")
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_name: tiny\nmodel_kind: transcoder_set\n{hooks}{config}")


def circuit_tracer_clt(folder: Path, t: Any) -> None:
    folder.mkdir()
    for at in range(LAYERS):
        held = {f"W_enc_{at}": t.w_enc[at], f"b_enc_{at}": t.b_enc[at], f"b_dec_{at}": t.b_dec[at]}
        if isinstance(t.activation[at], pc.JumpReLU):
            held[f"threshold_{at}"] = t.activation[at].theta
        if t.w_skip[at] is not None:
            held[f"W_skip_{at}"] = t.w_skip[at]
        save_file(held, folder / f"W_enc_{at}.safetensors")
        save_file({f"W_dec_{at}": t.w_dec[at]}, folder / f"W_dec_{at}.safetensors")
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_name: tiny\nmodel_kind: cross_layer_transcoder\n{hooks}")


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_circuit_tracer_per_layer(tmp_path: Path, rule: str) -> None:
    expected = made(False, rule)
    circuit_tracer_plt(tmp_path / "set", expected)
    got = formats.load(tmp_path / "set")
    same(got, expected)
    same_activity(got, expected)
    same_graph(got, expected)


def test_circuit_tracer_topk(tmp_path: Path) -> None:
    """As facebook/crv-8b-instruct-transcoders: k of any sign."""
    expected = made(False, "topk_negative", skip=False)
    circuit_tracer_plt(tmp_path / "set", expected, "activation: topk\nk: 5\n")
    got = formats.load(tmp_path / "set")
    same(got, expected)
    same_activity(got, expected)
    same_graph(got, expected)


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_circuit_tracer_cross_layer(tmp_path: Path, rule: str) -> None:
    expected = made(True, rule, reads="resid_mid")
    circuit_tracer_clt(tmp_path / "set", expected)
    got = formats.load(tmp_path / "set")
    same(got, expected)
    same_activity(got, expected)
    same_graph(got, expected)


def test_recognised(tmp_path: Path) -> None:
    circuit_tracer_plt(tmp_path / "plt", made(False))
    circuit_tracer_clt(tmp_path / "clt", made(True))
    seen = formats.recognise(tmp_path / "plt")
    assert seen.format.name == "circuit-tracer, per layer" and "3 files layer_*.safetensors" in str(seen)
    assert formats.recognise(str(tmp_path / "clt")).format.name == "circuit-tracer, cross-layer"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"must hold one of: circuit-tracer.*; got a folder with x\.json"):
        formats.load(tmp_path / "other")
