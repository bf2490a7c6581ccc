"""Every format: a set with random weights in exactly its layout, next to the same set in memory."""

from __future__ import annotations

import gc
import json
import os
import struct
import subprocess
import sys
import warnings
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import pytest
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
from safetensors.torch import load_file, save_file
from torch import Tensor

import pycircuit as pc
from pycircuit.transcoders import formats
from pycircuit.transcoders import lazy as lazy_rows
from pycircuit.transcoders.formats import cached_encoder, files, npz, saving
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
    model = builders.build(family)
    graphs = [pc.attribute(pc.ReplacementModel(model, t), builders.prompt(9), max_targets=2) for t in (got, expected)]
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


@pytest.mark.parametrize("to", ["circuit-tracer", "saelens"])
@pytest.mark.parametrize("name", ROWS)
def test_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, to: str) -> None:
    """Nothing is lost: what is read from the new files is what the old ones say."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected, row = write(name, tmp_path / "set"), ROWS[name]
    refused = row.holds["cross"] or isinstance(expected.activation[0], pc.TopK)
    if to == "saelens" and refused:
        with pytest.raises(ValueError, match="convert: to must be circuit-tracer or pycircuit for"):
            formats.convert(tmp_path / "set", tmp_path / "new", to, **row.told)
        assert not (tmp_path / "new").exists()
        return
    assert formats.convert(tmp_path / "set", tmp_path / "new", to, **row.told) == tmp_path / "new"
    told = {"writes": "mlp_raw"} if expected.writes == "mlp_raw" else {}
    got = formats.load(tmp_path / "new", **told)
    same(got, expected)
    same_activity(got, expected)
    same(got, formats.load(tmp_path / "set", **row.told))


def test_conversion_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycircuit.transcoders.formats import writing

    expected, wrote, seen = write("gemma_scope_2_affine", tmp_path / "set"), writing.write_safetensors, []

    def stops(path: Path, tensors: Any) -> None:
        seen.append(path.name)
        if len(seen) == 3:
            raise OSError("disk full")
        wrote(path, tensors)

    monkeypatch.setattr(writing, "write_safetensors", stops)
    with pytest.raises(OSError, match="disk full"):
        formats.convert(tmp_path / "set", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"must hold one of|config\.yaml"):
        formats.load(next(tmp_path.glob(".new*")))
    formats.convert(tmp_path / "set", tmp_path / "new")
    assert seen == ["layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors", "layer_2.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]
    assert len(list((tmp_path / "new").iterdir())) == LAYERS + 1
    same(formats.load(tmp_path / "new"), expected)


def test_conversion_starts_anew_for_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("circuit_tracer", tmp_path / "set")
    with monkeypatch.context() as broken, pytest.raises(AttributeError, match="encode"):
        broken.setattr(saving, "_config", lambda *args: None)
        formats.convert(tmp_path / "set", tmp_path / "new")
    expected = made(False, "relu")
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    ROWS["circuit_tracer_relu"].write(tmp_path / "set", expected)
    formats.convert(tmp_path / "set", tmp_path / "new", dtype=torch.float64)
    same(formats.load(tmp_path / "new"), expected.to(torch.float64))


def test_converted_types_and_arguments(tmp_path: Path) -> None:
    expected = write("circuit_tracer_bf16", tmp_path / "set")
    formats.convert(tmp_path / "set", tmp_path / "wide", "pycircuit", dtype=torch.float32)
    same(formats.load(tmp_path / "wide"), expected.to(torch.float32))
    with pytest.raises(ValueError, match=r"convert: to must be one of circuit-tracer, pycircuit, saelens, got 'pt'"):
        formats.convert(tmp_path / "set", tmp_path / "other", "pt")
    with pytest.raises(FileExistsError, match=r"convert: path must be a new folder"):
        formats.convert(tmp_path / "set", tmp_path / "wide")
    with pytest.raises(ValueError, match=r"convert: dtype must be float64"):
        formats.convert(tmp_path / "set", tmp_path / "other", dtype=torch.int8)


def test_inspected(tmp_path: Path) -> None:
    t = made(False, hole=1)
    t.w_enc[0][3], t.b_enc[0][3] = t.w_enc[0][7], t.b_enc[0][7]
    t.w_dec[0][5] = 0.0
    t.w_enc[2][1], t.b_enc[2][1] = 0.0, -1.0
    t.w_dec[2][4, 2] = torch.inf
    formats.save(t, tmp_path / "set", model="tiny")
    report = formats.inspect(tmp_path / "set")
    assert (report.format, report.kind, report.model) == ("circuit-tracer, per layer", "per layer", "tiny")
    assert (report.features, report.width, report.dtypes) == ([SIZE, None, SIZE], WIDTH, {"float32": 13})
    assert (report.reads, report.writes, report.skip) == ("mlp_in", "mlp_out", True)
    held = [x for x in (*t.w_enc, *t.b_enc, *t.w_dec, *t.b_dec, *t.w_skip) if x is not None]
    assert report.bytes == 4 * (sum(x.numel() for x in held) + 2 * SIZE)
    assert report.warnings == [
        "layer 0: 1 features are dead: they are never active or write nothing",
        "layer 0: 1 features repeat another one's encoder, 7",
        f"layer 2: {tmp_path / 'set' / 'layer_2.safetensors'}: W_dec holds 1 numbers that are NaN or infinite",
    ]
    text = str(report)
    assert "layers      3, 1 without a transcoder" in text and "features    2 x 24, width 32" in text
    assert json.loads(json.dumps(report.json()))["features"] == [SIZE, None, SIZE]
    assert formats.inspect(tmp_path / "set", weights=False).warnings == []


@pytest.mark.parametrize("name", ROWS)
def test_every_format_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected = write(name, tmp_path / "set")
    report = formats.inspect(tmp_path / "set", **ROWS[name].told)
    assert (report.format, report.kind) == (
        ROWS[name].format, "cross-layer" if ROWS[name].holds["cross"] else "per layer"
    )  # fmt: skip
    assert report.features == [SIZE] * LAYERS and report.width == WIDTH and report.warnings == []
    assert (report.reads, report.writes) == (expected.reads, expected.writes)


BAD: dict[str, tuple[str, Any, str]] = {  # row, what is done to the folder, what is said
    "missing_layer": (
        "circuit_tracer", lambda f: (f / "layer_1.safetensors").unlink(), r"must hold layer_1\.safetensors of layer 1"
    ),
    "missing_archive": (
        "gemma_scope", lambda f: (f / "layer_1" / "width_16k" / "average_l0_8" / "params.npz").unlink(), "of layer 1"
    ),
    "missing_decoder": ("circuit_tracer_cross", lambda f: (f / "W_dec_1.safetensors").unlink(), r"W_dec_1\.safe"),
    "missing_last_layer": ("circuit_tracer_cross", lambda f: (f / "W_enc_2.safetensors").unlink(), "must have shape"),
    "truncated": ("gemma_scope_2", lambda f: cut(next(f.rglob("*.safetensors"))), "is it truncated"),
    "truncated_archive": ("gemma_scope", lambda f: cut(next(f.rglob("*.npz"))), "is it truncated"),
    "missing_tensor": ("sparsify", lambda f: edit(next(f.rglob("*.safetensors")), b_dec=None), "must hold b_dec, got"),
    "unknown_tensor": (
        "circuit_tracer", lambda f: edit(f / "layer_0.safetensors", W_gate=torch.ones(2)), "got W_gate, which would be"
    ),
    "wrong_shape": (
        "circuit_tracer", lambda f: edit(f / "layer_2.safetensors", W_dec=torch.ones(SIZE, WIDTH + 1)),
        r"layer_2\.safetensors: W_dec must have shape \[24, 32\] .* got \[24, 33\]",
    ),
    "wrong_width": (
        "circuit_tracer", lambda f: edit(f / "layer_2.safetensors", W_enc=torch.ones(SIZE, 16)),
        r"layer_2\.safetensors: .*W_enc of layer_0\.safetensors has width 32",
    ),
    "integers": (
        "circuit_tracer", lambda f: edit(f / "layer_0.safetensors", b_enc=torch.ones(SIZE, dtype=torch.int32)),
        r"layer_0\.safetensors: b_enc must be one of F64, F32, BF16, F16, got I32",
    ),
    "nan_bias": (
        "saelens", lambda f: edit(next(f.rglob("*.safetensors")), b_enc=torch.full((SIZE,), torch.nan)),
        r"sae_weights\.safetensors: b_enc must hold finite numbers, got nan at \[0\]",
    ),
    "infinite_encoder": (
        "circuit_tracer", lambda f: edit(f / "layer_1.safetensors", W_enc=torch.full((SIZE, WIDTH), torch.inf)),
        r"layer_1\.safetensors: W_enc must hold finite numbers, got inf at \[0, 0\]",
    ),
    "traversal": (
        "listed", lambda f: rewrite(f / "config.yaml", "files/1", "../set/files/1"), "must name files inside its folder"
    ),
    "absolute": ("listed", lambda f: rewrite(f / "config.yaml", "files/1", "/etc/1"), "must name files inside its"),
    "pickle": ("listed", lambda f: pickled(f, "files/1.safetensors", "files/1.pt"), "must not be a pickle, which can"),
    "no_hook": ("circuit_tracer", lambda f: rewrite(f / "config.yaml", "mlp.hook_in", "hook_resid_post"), "say reads="),
    "tag": ("circuit_tracer", lambda f: rewrite(f / "config.yaml", "tiny", "!!python/object/apply:exit []"), "plain"),
    "alias": ("circuit_tracer", lambda f: rewrite(f / "config.yaml", "tiny", "&a x\nother: *a"), "an alias"),
    "twice": ("circuit_tracer", lambda f: rewrite(f / "config.yaml", "tiny", "tiny\nmodel_name: b"), "a name twice"),
    "deep": ("circuit_tracer", lambda f: rewrite(f / "config.yaml", "tiny", "[" * 5000), "must be plain YAML"),
    "groupmax": ("sparsify", lambda f: rewrite(next(f.rglob("cfg.json")), '"topk"', '"groupmax"'), "must be topk"),
    "autoencoder": ("sparsify", lambda f: rewrite(next(f.rglob("cfg.json")), '"transcode": true', '"a": 1'), "no tra"),
    "normalized": ("saelens", lambda f: rewrite(next(f.rglob("cfg.json")), '"none"', '"layer_norm"'), "fold it in"),
    "batchtopk": ("llamascopium_topk", lambda f: rewrite(next(f.rglob("config.json")), '"topk"', '"batchtopk"'), "bat"),
    "different_hooks": (
        "gemma_scope_2",
        lambda f: rewrite(next(f.rglob("config.json")), "pre_feedforward_layernorm.output", "mlp.input"),
        None,
    ),
    "other_places": (
        "gemma_scope_2", lambda f: rewrite(next(f.rglob("config.json")), "layernorm.output", "layernorm.input"),
        "reads must be the same in every layer|hf_hook_point_out must be one of",
    ),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def edit(path: Path, **changes: Tensor | None) -> None:
    save_file({k: v for k, v in {**load_file(path), **changes}.items() if v is not None}, path)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def pickled(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)
    rewrite(folder / "config.yaml", old, new)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "memory"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_files(tmp_path: Path, bad: str, lazy: bool) -> None:
    name, damage, said = BAD[bad]
    write(name, tmp_path / "set")
    damage(tmp_path / "set")
    if said is None:  # another name for the same place
        formats.load(tmp_path / "set", lazy=lazy)
        return
    with pytest.raises((ValueError, TypeError, OSError), match=said) as caught:
        formats.load(tmp_path / "set", lazy=lazy)
    assert str(caught.value).startswith("load: ")


@pytest.mark.parametrize("name", ["circuit_tracer", "circuit_tracer_cross"])
def test_a_decoder_that_is_not_finite_is_refused_as_its_row_is_read(tmp_path: Path, name: str) -> None:
    write(name, tmp_path / "set")
    path = tmp_path / "set" / ("W_dec_1.safetensors" if "cross" in name else "layer_1.safetensors")
    key = "W_dec_1" if "cross" in name else "W_dec"
    weights = load_file(path)[key]
    weights[3] = torch.nan
    edit(path, **{key: weights})
    got = formats.load(tmp_path / "set")
    found = pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1))
    with pytest.raises(ValueError, match=rf"{key} must hold finite numbers, got NaN or infinity in row 3"):
        pc.ops.decode(found, got.w_dec[1])
    with pytest.raises(ValueError, match=rf"{key} must hold finite numbers, got NaN or infinity in row 3"):
        formats.load(tmp_path / "set", lazy=False)


def archive(path: Path, *members: tuple[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as held, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name that comes twice
        for name, data in members:
            held.writestr(name, data)


def array(*shape: int, kind: str = "<f4", fortran: bool = False) -> bytes:
    """The header of an .npy file."""
    text = repr({"descr": kind, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


ARCHIVES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "bomb": ([("W_enc.npy", array(2**20) + bytes(2**22))], "is it a bomb"),
    "objects": ([("W_enc.npy", array(2, kind="|O") + b"cos\nsystem\n")], "pickled objects, which could run anything"),
    "integers": ([("W_enc.npy", array(2, kind="<i8") + bytes(16))], "must be one of <f8, <f4, <f2, got <i8"),
    "big_endian": ([("W_enc.npy", array(2, kind=">f4") + bytes(8))], "got >f4"),
    "columns_first": ([("W_enc.npy", array(2, 2, fortran=True) + bytes(16))], "row by row"),
    "short": ([("W_enc.npy", array(2) + bytes(4))], "bytes by its header"),
    "no_header": ([("W_enc.npy", b"abc")], "in NumPy's format"),
    "code": ([("W_enc.npy", array(2).replace(b"'<f4'", b"exit()") + bytes(8))], "in NumPy's format"),
    "folder": ([("../W_enc.npy", array(1) + bytes(4))], "no folder"),
    "other": ([("W_enc.txt", b"1")], "must hold .npy files"),
    "twice": ([("W_enc.npy", array(1) + bytes(4))] * 2, "twice"),
    "empty": ([], "must hold W_enc, got no tensor"),
}


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
@pytest.mark.parametrize("bad", ARCHIVES)
def test_bad_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, how: int) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(npz, "_SMALL", 1 << 20)
    if bad == "bomb" and how == zipfile.ZIP_STORED:
        return  # what is stored as it is does not grow
    (tmp_path / "layer_0").mkdir()
    archive(tmp_path / "layer_0" / "params.npz", *ARCHIVES[bad][0], how=how)
    with pytest.raises((ValueError, TypeError), match=ARCHIVES[bad][1]):
        formats.load(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_flipped_bit_in_an_archive_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected = write("gemma_scope", tmp_path / "set")
    path = next((tmp_path / "set" / "layer_0").rglob("params.npz"))
    bits = expected.w_enc[0].T.contiguous().numpy().tobytes()[:16]
    data = bytearray(path.read_bytes())
    data[data.find(bits) + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"params\.npz.* Bad CRC-32 for file 'W_enc.npy'"):
        formats.load(tmp_path / "set")
    archive(tmp_path / "large.npz", ("W_enc.npy", array(20_000) + bytes(80_000)), how=zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "large.npz").read_bytes())
    data[50_000] = 4
    (tmp_path / "large.npz").write_bytes(data)
    for read in (files.Stored.read, files.Stored.mapped):
        with pytest.raises(ValueError, match=r"large\.npz: W_enc must have the checksum \w{8}, got"):
            read(npz.open_npz(tmp_path / "large.npz")["W_enc"])


def test_files_in_parts(tmp_path: Path) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    for at in range(LAYERS):
        whole = tmp_path / "set" / f"layer_{at}.safetensors"
        tensors, where = load_file(whole), {}
        for n, name in enumerate(sorted(tensors)):
            part = f"layer_{at}-0000{n % 2}-of-00002.safetensors"
            where[name] = part
            there = tmp_path / "set" / part
            save_file({**(load_file(there) if there.exists() else {}), name: tensors[name]}, there)
        whole.unlink()
        whole.with_name(whole.name + ".index.json").write_text(json.dumps({"weight_map": where}))
    same(formats.load(tmp_path / "set"), expected)
    index = tmp_path / "set" / "layer_1.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"]["W_dec"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"layer_1.safetensors.index.json must name files inside its folder"):
        formats.load(tmp_path / "set")
    said["weight_map"]["W_dec"] = "layer_1-00009-of-00002.safetensors"
    index.write_text(json.dumps(said))
    with pytest.raises(FileNotFoundError, match=r"got no such file"):
        formats.load(tmp_path / "set")


@pytest.mark.parametrize("name", ["circuit_tracer", "gemma_scope", "sparsify", "saelens", "llamascopium"])
def test_layers_that_are_meant_to_be_missing(tmp_path: Path, name: str) -> None:
    """Files for some layers only, and the model's number of layers said."""
    expected = write(name, tmp_path / "set")
    marks = {"circuit_tracer": "layer_1.", "gemma_scope": "layer_1/", "sparsify": "layers.1.", "saelens": "name-2/",
             "llamascopium": "layer1_"}  # fmt: skip
    for path in sorted((tmp_path / "set").rglob("*")):
        if path.is_file() and marks[name] in path.as_posix():
            path.unlink()
    got = formats.load(tmp_path / "set", layers=LAYERS + 1)
    assert got.depth == LAYERS + 1 and [w is None for w in got.w_enc] == [False, True, False, True]
    assert torch.equal(got.w_enc[2], expected.w_enc[2])
    with pytest.raises(FileNotFoundError, match=r"of layer 1, got none; say layers="):
        formats.load(tmp_path / "set")
    with pytest.raises(ValueError, match=r"load: layers must be at least 3"):
        formats.load(tmp_path / "set", layers=2)
    with pytest.raises(ValueError, match=r"load: layers must be a whole number of at least 1 and at most 10000, got 0"):
        formats.load(tmp_path / "set", layers=0)


def test_one_of_several_sets_is_named(tmp_path: Path) -> None:
    for size, seed in (("16k", 1.0), ("65k", 2.0)):
        t = made(False, skip=False)
        t.w_enc = [w * seed for w in t.w_enc]
        for at in range(LAYERS):
            inner = tmp_path / "transcoder_all" / f"layer_{at}_width_{size}_l0_small"
            inner.mkdir(parents=True)
            held = {"w_enc": t.w_enc[at].T, "w_dec": t.w_dec[at], "b_enc": t.b_enc[at], "b_dec": t.b_dec[at],
                    "threshold": t.activation[at].theta}  # fmt: skip
            save_file({k: v.contiguous() for k, v in held.items()}, inner / "params.safetensors")
    with pytest.raises(ValueError, match=r"variant must leave one file for layer 0 .* got 2: .*layer_0_width_16k"):
        formats.load(tmp_path)
    with pytest.raises(ValueError, match=r"variant must leave some of .* got '1m'"):
        formats.load(tmp_path, variant="1m")
    assert torch.equal(formats.load(tmp_path, variant="width_65k").w_enc[0], 2 * made(False).w_enc[0])
    assert torch.equal(formats.load(tmp_path, variant="16k, small").w_enc[0], made(False).w_enc[0])


def test_places_that_no_file_says(tmp_path: Path) -> None:
    write("crosslayer", tmp_path / "set")
    with pytest.raises(ValueError, match=r"load: reads must be given for .* whose files do not say it, got None"):
        formats.load(tmp_path / "set")
    with pytest.raises(ValueError, match=r"load: writes must be one of mlp_out, mlp_raw, or a hook's name, got 'out'"):
        formats.load(tmp_path / "set", reads="mlp_in", writes="out")
    write("circuit_tracer", tmp_path / "other")
    assert formats.load(tmp_path / "other", reads="mlp_normed").reads == "mlp_normed"


def test_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file with everything, found before the others are asked."""
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    expected = write("circuit_tracer", tmp_path / "set")

    def sees(folder: Path) -> str | None:
        return "a file of mine" if (folder / "mine").exists() else None

    def read(folder: Path, asked: formats.Asked) -> formats.Contents:
        return formats.FORMATS["circuit-tracer, per layer"].read(folder, asked)

    row = pc.register_format("mine", sees, read)
    assert formats.recognise(tmp_path / "set").format.name == "circuit-tracer, per layer"
    (tmp_path / "set" / "mine").write_text("")
    assert formats.recognise(tmp_path / "set").format is row
    same(formats.load(tmp_path / "set"), expected)
    with pytest.raises(TypeError, match=r"register_format: needs a name and two functions"):
        pc.register_format("mine", "sees", read)  # type: ignore[arg-type]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, bytes) of every read of decoder rows."""
    seen: list[tuple[str, int]] = []
    fill = lazy_rows._fill

    def spy(file: int, plane: Any, buffers: list[memoryview], at: int) -> None:
        seen.append((plane.path.name, sum(map(len, buffers))))
        fill(file, plane, buffers, at)

    monkeypatch.setattr(lazy_rows, "_fill", spy)
    return seen


@pytest.mark.parametrize(
    "name", ["circuit_tracer", "circuit_tracer_cross", "gemma_scope_2_cross", "llamascopium_cross"]
)
def test_each_active_row_is_read_once(tmp_path: Path, reads: list[tuple[str, int]], name: str) -> None:
    """By a whole graph: forward, sweep of many tiles, all of it."""
    t = write(name, tmp_path / "set")
    model = pc.ReplacementModel(builders.build("llama"), formats.load(tmp_path / "set"))
    reads.clear()
    graph = pc.attribute(model, builders.prompt(9), max_features=40, round_size=10, progress=False)
    used = torch.unique(graph.features[:, [0, 2]], dim=0)
    slots = [LAYERS - int(layer) if ROWS[name].holds["cross"] else 1 for layer in used[:, 0]]
    assert graph.rows.count > 30 and sum(size for _, size in reads) == sum(slots) * WIDTH * 4
    assert t.depth == LAYERS


def test_rows_are_read_again_above_the_cache(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    expected = write("circuit_tracer_cross", tmp_path / "set")
    got = formats.load(tmp_path / "set", cache=0)
    same_graph(got, expected)
    many = len(reads)
    reads.clear()
    same_graph(formats.load(tmp_path / "set", cache="1 MiB"), expected)
    assert many > 3 * len(reads) > 0
    for bad in ("1 furlong", -1, True):
        with pytest.raises(ValueError, match=r"load: cache must be bytes or a size such as '4GiB'"):
            formats.load(tmp_path / "set", cache=bad)


def test_the_cache_is_bounded_and_forgets(tmp_path: Path) -> None:
    expected = write("circuit_tracer_cross", tmp_path / "set")
    got = formats.load(tmp_path / "set", cache=3000)
    cache = got.w_dec[0].cache
    assert all(w.cache is cache for w in got.w_dec)
    row = LAYERS * WIDTH * 4
    found = [pc.SparseFeatures(torch.tensor([0, 2]), torch.tensor([n, n + 3]), torch.ones(2)) for n in range(9)]
    for f in found:
        assert torch.equal(pc.ops.decode(f, got.w_dec[0]), pc.ops.decode(f, expected.w_dec[0]))
        assert cache.held <= 3000
    assert cache.held == 3000 // (2 * row) * 2 * row > 0
    del found, f
    assert cache.held == 0


def test_the_cache_sees_that_features_were_written_to(tmp_path: Path) -> None:
    expected = write("circuit_tracer_cross", tmp_path / "set")
    got = formats.load(tmp_path / "set")
    f = pc.SparseFeatures(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2))
    for _ in range(2):
        assert torch.equal(pc.ops.decode(f, got.w_dec[0]), pc.ops.decode(f, expected.w_dec[0]))
        f.index.add_(4)


def test_the_cache_keeps_nothing_of_prompts_that_are_gone(tmp_path: Path) -> None:
    write("circuit_tracer_cross", tmp_path / "set")
    got = formats.load(tmp_path / "set")
    count = len(weakref.finalize._registry)
    for n in range(9):
        pc.ops.decode(pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([n]), torch.ones(1)), got.w_dec[0])
    assert len(weakref.finalize._registry) <= count + 1
    cache, kept = got.w_dec[0].cache, pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([2]), torch.ones(1))
    pc.ops.decode(kept, got.w_dec[0])
    assert cache.held > 0
    del got
    gc.collect()
    assert cache.held == 0


@pytest.mark.parametrize("cache", ["1 GiB", 15_000, 0])
def test_the_estimate_counts_rows_left_in_files(tmp_path: Path, cache: Any) -> None:
    """As many bytes as a trace keeps; where they are read again, those of the widest layer beside the cache."""
    write("circuit_tracer_cross", tmp_path / "set")
    held = formats.load(tmp_path / "set", cache=cache)
    model, ids = pc.ReplacementModel(builders.build("llama"), held), builders.prompt(9)
    said = pc.estimate(model, ids, max_features=5).plan.needs["decoder rows"]
    kept = held.w_dec[0].cache
    local = model.freeze(ids)
    sizes = [len(f.index.unique()) * (LAYERS - at) * WIDTH * 4 for at, f in enumerate(local.features)]
    assert sum(sizes) > 15_000
    if cache == "1 GiB":
        assert said == kept.held == sum(sizes)
    else:
        assert kept.held <= cache and said == cache + max(sizes)
    plain = pc.ReplacementModel(builders.build("llama"), formats.load(tmp_path / "set", lazy=False))
    less = pc.estimate(plain, ids, max_features=5)
    assert "decoder rows" not in less.plan.needs
    with pytest.raises(MemoryError, match="attribute: memory must be at least"):
        pc.attribute(model, ids, max_features=5, memory=1000, progress=False)


@pytest.mark.parametrize("name", ["gemma_scope", "gemma_scope_2", "saelens_skip", "llamascopium_cross", "crosslayer"])
def test_encoders_stored_the_other_way_are_turned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Into a file of the cache, whose pages then serve; a file that changed is turned anew."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    monkeypatch.setattr(cached_encoder, "_STEP", 7 * WIDTH * 4)
    expected, row = write(name, tmp_path / "set"), ROWS[name]
    for _ in range(2):
        got = formats.load(tmp_path / "set", **row.told)
        same(got, expected)
        same_activity(got, expected)
        kept = sorted((tmp_path / "cache" / "encoders").iterdir())
        assert len(kept) == LAYERS and all(p.suffix == ".safetensors" for p in kept)
    same(formats.load(tmp_path / "set", lazy=False, **row.told), expected)
    same(formats.load(tmp_path / "set", dtype=torch.float64, **row.told), expected.to(torch.float64))
    assert sorted((tmp_path / "cache" / "encoders").iterdir()) == kept
    first = next(p for p in sorted((tmp_path / "set").rglob("*")) if p.suffix in (".npz", ".safetensors"))
    os.utime(first, ns=(1, 1))
    same(formats.load(tmp_path / "set", **row.told), expected)
    assert len(list((tmp_path / "cache" / "encoders").iterdir())) > LAYERS


def test_an_encoder_that_is_not_finite_is_refused_turned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    write("gemma_scope_2", tmp_path / "set")
    path = next((tmp_path / "set").rglob("*.safetensors"))
    weights = load_file(path)["w_enc"]
    weights[3, 5] = torch.nan
    edit(path, w_enc=weights)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"params\.safetensors.*must hold finite numbers, got nan at \[5, 3\]"):
            formats.load(tmp_path / "set")


def test_threads_share_rows(tmp_path: Path) -> None:
    expected = write("gemma_scope_2_cross", tmp_path / "set")
    got = formats.load(tmp_path / "set", cache=20_000)
    found = [pc.SparseFeatures(torch.tensor([0, 3]), torch.tensor([n, n + 2, n + 5]), torch.ones(3)) for n in range(16)]
    right = [pc.ops.decode(f, expected.w_dec[0]) for f in found]
    with ThreadPoolExecutor(8) as pool:
        for n, out in enumerate(pool.map(lambda f: pc.ops.decode(f, got.w_dec[0]), found * 20)):
            assert torch.equal(out, right[n % 16])


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "planes"])
def test_many_rows_are_read_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool) -> None:
    """Rows next to each other, far apart, more than one call may take, at odd offsets."""
    monkeypatch.setattr(lazy_rows, "_PARALLEL", 1000)
    w = torch.randn(3, 5000, 7, generator=torch.Generator().manual_seed(0))
    (tmp_path / "raw").write_bytes(b"abc" + w.numpy().tobytes())
    whole = files.Stored.whole(tmp_path / "raw", "w", 3, tuple(w.shape), torch.float32)
    planes = [whole.entry(n) for n in range(3)]
    rows = LazyRows.of(planes if stacked else planes[1:2], stacked, None, lazy_rows.Cache(0))
    used = torch.cat([torch.arange(3), torch.arange(100, 3000), torch.arange(3001, 5000, 7)])
    assert torch.equal(rows.rows(used), w[:, used].transpose(0, 1) if stacked else w[1, used])
    assert rows.rows(used[:0]).shape == (0, *rows.shape[1:])


def test_rows_by_number(tmp_path: Path) -> None:
    """In any order and more than once, as of a tensor."""
    t = write("llamascopium_cross", tmp_path / "set")
    got, index = formats.load(tmp_path / "set"), torch.tensor([5, 2, 5, 0])
    assert torch.equal(got.w_dec[1][index], t.w_dec[1][index])
    assert torch.equal(got.decoder(1, 2)[index], t.decoder(1, 2)[index])
    assert got.decoder(0, 2).shape == t.decoder(0, 2).shape
    with pytest.raises(ValueError, match=r"must be one of 2 slots, got 2"):
        got.w_dec[1].slot(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The largest numbers are; NaN and infinities of either sign are not, wherever they are."""
    monkeypatch.setattr(lazy_rows, "_CHECKED", 8)
    limits = torch.finfo(dtype)
    t = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 1.0] * 6, dtype=dtype).view(10, 3)
    for whole in (t, t[:, :2], t[::2], t.flatten(), t[0, 0], t[:0]):
        assert lazy_rows.is_finite(whole)
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for at in (0, 7, 29):
            damaged = t.clone().flatten()
            damaged[at] = bad
            assert not lazy_rows.is_finite(damaged) and not lazy_rows.is_finite(damaged.view(10, 3))


def test_a_file_that_shrinks_is_seen(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    got = formats.load(tmp_path / "set")
    path = tmp_path / "set" / "layer_0.safetensors"
    with path.open("r+b") as file:
        file.truncate(got.w_dec[0].offset + 10)
    found = pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1))
    with pytest.raises(ValueError, match=r"layer_0\.safetensors must not change while in use, got 442 bytes"):
        pc.ops.decode(found, got.w_dec[0])


HELD = """
import sys, builders, pycircuit as pc
from pycircuit.transcoders import formats
def own():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))
hf_model = builders.build("llama")
for lazy in (True, False):
    before = own()
    model = pc.ReplacementModel(hf_model, formats.load(sys.argv[1], lazy=lazy))
    graph = pc.attribute(model, builders.prompt(9), max_features=20, progress=False)
    print(own() - before, len(graph.features))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to see a process's memory")
def test_memory_of_a_graph(tmp_path: Path) -> None:
    """What is held beside pages of the files, which the system may drop: of 70 MB of them, next to nothing."""
    g, size = torch.Generator().manual_seed(0), 60_000
    w_enc = [torch.randn(size, WIDTH, generator=g) / WIDTH**0.5 for _ in range(LAYERS)]
    w_dec = [torch.zeros(size, LAYERS - n, WIDTH) for n in range(LAYERS)]
    every = [torch.zeros(size)] * LAYERS
    formats.save(pc.CrossLayerTranscoder(w_enc, every, w_dec, activation=pc.TopK(20)), tmp_path / "set")
    held = sum(p.stat().st_size for p in (tmp_path / "set").iterdir())
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", HELD, str(tmp_path / "set")]
    out = subprocess.run(words, capture_output=True, text=True, env=path, check=True).stdout.splitlines()
    (lazy, features), (memory, same_features) = (map(int, line.split()) for line in out)
    assert features == same_features == LAYERS * 8 * 20
    assert lazy < 0.25 * held < 0.9 * held < memory


@pytest.mark.parametrize("name", ["gemma_scope", "gemma_scope_2", "saelens_jumprelu", "crosslayer"])
def test_a_threshold_below_zero_is_that_of_a_relu(tmp_path: Path, name: str) -> None:
    """Their JumpReLUs come after a ReLU; circuit-tracer's does not."""
    for row, least in ((name, 0.0), ("circuit_tracer", -0.5)):
        t = made(**ROWS[row].holds)
        for at in range(LAYERS):
            t.activation[at] = pc.JumpReLU(torch.full((SIZE,), -0.5))
        (tmp_path / row).mkdir()
        ROWS[row].write(tmp_path / row, t)
        rules = formats.load(tmp_path / row, **ROWS[row].told).activation
        assert [float(rule.theta.min()) for rule in rules] == [least] * LAYERS
