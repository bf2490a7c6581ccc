"""Every format: a set with random weights in exactly its layout, next to the same set in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from format_files import (
    LAYERS,
    ROWS,
    RULES,
    SIZE,
    WIDTH,
    crosslayer,
    llamascopium,
    llamascopium_cross,
    made,
    normal,
    write,
)
from safetensors.torch import load_file
from torch import Tensor

import pycircuit as pc
from pycircuit.transcoders import formats
from pycircuit.transcoders.lazy import LazyRows

pytestmark = pytest.mark.usefixtures("one_thread")


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
    graphs = [
        pc.attribute(pc.ReplacementModel(model, t), tiny_models.prompt(9), max_targets=2) for t in (got, expected)
    ]
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


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "memory"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lazy: bool) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected, row = write(name, tmp_path / "set"), ROWS[name]
    seen = formats.recognise(tmp_path / "set")
    assert seen.format.name == row.format and seen.saw in str(seen)
    got = formats.load(tmp_path / "set", lazy=lazy, **row.told)
    same(got, expected)
    for a, b in zip(got.activation, expected.activation, strict=True):
        same_rule(a, b, row.exact)
    same_activity(got, expected)
    same_graph(got, expected)


def same_rule(got: Any, expected: Any, exact: bool) -> None:
    """Thresholds may have gone through a logarithm or another type."""
    assert type(got) is type(expected)
    if isinstance(got, pc.JumpReLU):
        assert torch.allclose(got.theta, expected.theta, rtol=0 if exact else 1e-6, atol=0)
    elif isinstance(got, pc.BatchTopK):
        assert got.threshold == expected.threshold if exact else got.threshold == pytest.approx(expected.threshold)
    else:
        assert got == expected


@pytest.mark.parametrize("name", ["circuit_tracer", "circuit_tracer_cross", "gemma_scope", "gemma_scope_2",
                                  "saelens_jumprelu", "crosslayer", "crosslayer_batchtopk"])  # fmt: skip
def test_at_the_threshold_itself_nothing_is_active(tmp_path: Path, name: str) -> None:
    """Encoders are the identity, so that a pre-activation can be put at, just above and just below its threshold."""
    row = ROWS[name]
    t = made(**row.holds)
    limits = torch.tensor([0.5, 0.25, 0.75, 0.5]) if row.holds.get("rule") is None else torch.full((4,), 0.6)
    for at in range(LAYERS):
        t.w_enc[at], t.b_enc[at] = torch.eye(SIZE, WIDTH), torch.zeros(SIZE)
        if row.holds.get("rule") is None:
            t.activation[at] = pc.JumpReLU(limits.repeat(SIZE // 4))
    (tmp_path / "set").mkdir()
    row.write(tmp_path / "set", t)
    got = formats.load(tmp_path / "set", **row.told)
    every = limits.repeat(WIDTH // 4)
    x = torch.stack([every, every.nextafter(torch.tensor(9.0)), every.nextafter(torch.tensor(0.0))])
    for at in range(LAYERS):
        assert got.encode(at, x).row_ptr.diff().tolist() == [0, SIZE, 0]


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_llamascopium_by_decoder_norm_and_dataset_norm(tmp_path: Path, cross: bool, kind: str) -> None:
    """Against its own arithmetic: streams are divided by their mean norm, values compared times the decoder's norm."""
    t = made(cross, kind, skip=False, reads="resid_mid" if cross else "mlp_normed")
    (tmp_path / "set").mkdir()
    inner, outer = torch.tensor([3.0, 5.0, 2.0]), torch.tensor([7.0, 0.5, 4.0])
    how = {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    if cross:
        llamascopium_cross(tmp_path / "set", t, norms=torch.stack([inner, outer]), **how)
    else:
        inner, outer = torch.full((LAYERS,), 3.0), torch.full((LAYERS,), 7.0)
        llamascopium(tmp_path / "set", t, norms=[inner[0], outer[0]], **how)
    got, x = (
        formats.load(tmp_path / "set"),
        3 * torch.randn(LAYERS, 6, WIDTH, generator=torch.Generator().manual_seed(1)),
    )
    written, active = torch.zeros(LAYERS, 6, WIDTH, dtype=torch.float64), []
    for at in range(LAYERS):
        norm = t.w_dec[at].double().flatten(1).norm(dim=1)
        pre = x[at].double() * WIDTH**0.5 / inner[at] @ t.w_enc[at].double().T + t.b_enc[at].double()
        active.append(t.activation[at].active(pre * norm))
        acts = pre * active[at]
        for to in range(at, LAYERS) if cross else [at]:
            written[to] += acts @ (t.w_dec[at][:, to - at] if cross else t.w_dec[at]).double()
    written = (written + torch.stack(t.b_dec).double()[:, None]) * outer[:, None, None] / WIDTH**0.5
    found = [got.encode(at, x[at]) for at in range(LAYERS)]
    for at in range(LAYERS):
        rows = [found[at].position(), found[at].index]
        assert torch.equal(torch.stack(rows), active[at].nonzero().T)
    assert torch.allclose(got.reconstruct(found).double(), written, rtol=1e-4, atol=1e-4)
    same_graph(got, formats.load(tmp_path / "set", lazy=False))


@pytest.mark.parametrize("how", ["Dimensionwise", "Layerwise"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_crosslayer_standardizers_are_folded_in(tmp_path: Path, cross: bool, how: str) -> None:
    t, g = made(cross, skip=False, bias=cross), torch.Generator().manual_seed(4)
    shape = (LAYERS, WIDTH) if how == "Dimensionwise" else (LAYERS,)
    standards = {
        f"{side}_standardizer.{name}": torch.rand(shape, generator=g) + (0.5 if name == "std" else 0.0)
        for side in ("input", "output")
        for name in ("mean", "std")
    }
    (tmp_path / "set").mkdir()
    crosslayer(tmp_path / "set", t, standards, how)
    mean, std, mean_out, std_out = (v.double().view(LAYERS, 1, -1) for v in standards.values())
    x = 2 * torch.randn(LAYERS, 6, WIDTH, generator=g).double()
    written, standard = torch.zeros_like(x), (x - mean) / std
    for at in range(LAYERS):
        pre = standard[at] @ t.w_enc[at].double().T + t.b_enc[at].double()
        acts = pre * t.activation[at].active(pre)
        for to in range(at, LAYERS) if cross else [at]:
            written[to] += acts @ (t.w_dec[at][:, to - at] if cross else t.w_dec[at]).double()
    bias = torch.stack(t.b_dec).double()[:, None] if cross else 0.0
    got = formats.load(tmp_path / "set", reads="mlp_in", writes="mlp_out", dtype=torch.float64)
    found = [got.encode(at, x[at]) for at in range(LAYERS)]
    assert torch.allclose(got.reconstruct(found), (written + bias) * std_out + mean_out, rtol=1e-5, atol=1e-5)


def test_what_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"must hold one of: circuit-tracer.*; got a folder with x\.json"):
        formats.load(tmp_path / "other")
