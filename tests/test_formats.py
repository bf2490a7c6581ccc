"""Every format: a set with random weights in exactly its layout, next to the same set in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import ROWS, crosslayer, llamascopium_by_norms, write
from random_transcoders import LAYERS, RULES, SIZE, WIDTH, random_set
from safetensors.torch import load_file, save_file
from transcoder_checks import assert_same, assert_same_activity, assert_same_graph, assert_same_rule

import pycircuit as pc
from pycircuit.files import atomic_folder
from pycircuit.transcoders import formats
from pycircuit.transcoders.formats import detect
from pycircuit.transcoders.lazy import LazyRows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "memory"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_saved_sets_load_as_they_were(tmp_path: Path, cross: bool, rule: str, lazy: bool) -> None:
    expected = random_set(cross, rule)
    pc.transcoders.save(expected, tmp_path / "set", model="tiny")
    got = pc.transcoders.load(tmp_path / "set", lazy=lazy)
    assert isinstance(got.w_dec[0], LazyRows) == lazy
    assert_same(got, expected)
    assert_same_activity(got, expected)
    assert_same_graph(got, expected)
    for a, b in zip(got.activation, expected.activation, strict=True):
        assert type(a) is type(b)
        assert isinstance(a, pc.JumpReLU) or a == b


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_are_kept_or_converted(tmp_path: Path, cross: bool, dtype: torch.dtype) -> None:
    expected = random_set(cross, dtype=dtype)
    pc.transcoders.save(expected, tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set")
    assert {t.dtype for t in (*got.w_enc, *got.b_enc, *got.w_skip)} == {dtype}
    assert_same(got, expected)
    for wanted in (torch.float64, torch.float32, torch.bfloat16):
        assert_same(pc.transcoders.load(tmp_path / "set", dtype=wanted), expected.to(wanted))
        assert_same(pc.transcoders.load(tmp_path / "set").to(wanted), expected.to(wanted))


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
@pytest.mark.parametrize("hole", [0, 1, 2])
def test_a_layer_without_transcoder_is_saved_as_such(tmp_path: Path, cross: bool, hole: int) -> None:
    expected = random_set(cross, hole=hole)
    pc.transcoders.save(expected, tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set")
    assert got.w_enc[hole] is None
    assert_same(got, expected)
    assert_same_graph(got, expected)


@pytest.mark.parametrize("reads", ["resid_mid", "mlp_normed", "mlp_in"])
@pytest.mark.parametrize("writes", ["mlp_out", "mlp_raw"])
def test_hook_points_are_saved(tmp_path: Path, reads: str, writes: str) -> None:
    pc.transcoders.save(random_set(False, reads=reads, writes=writes), tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set")
    assert (got.reads, got.writes) == (reads, writes)


def test_a_missing_bias_is_saved_as_zeros(tmp_path: Path) -> None:
    expected = random_set(False, bias=False)
    pc.transcoders.save(expected, tmp_path / "set")
    assert expected.b_dec == [None] * LAYERS
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)


def test_saved_files_have_the_layout_of_circuit_tracer(tmp_path: Path) -> None:
    """Names, shapes and orientations of circuit-tracer's layout."""
    plt, clt = random_set(False, "batchtopk"), random_set(True)
    pc.transcoders.save(plt, tmp_path / "plt", model="tiny", scan="there")
    tensors = load_file(tmp_path / "plt" / "layer_1.safetensors")
    assert set(tensors) == {"W_enc", "W_dec", "b_enc", "b_dec", "activation_function.threshold", "W_skip"}
    assert torch.equal(tensors["W_enc"], plt.w_enc[1]) and torch.equal(tensors["W_skip"], plt.w_skip[1].T)
    assert torch.equal(tensors["activation_function.threshold"], torch.full((SIZE,), 0.6))
    text = (tmp_path / "plt" / "config.yaml").read_text()
    assert "model_kind: transcoder_set" in text and "feature_input_hook: mlp.hook_in" in text and "scan: there" in text
    pc.transcoders.save(clt, tmp_path / "clt")
    tensors = load_file(tmp_path / "clt" / "W_enc_1.safetensors") | load_file(tmp_path / "clt" / "W_dec_1.safetensors")
    assert set(tensors) == {"W_enc_1", "b_enc_1", "b_dec_1", "threshold_1", "W_skip_1", "W_dec_1"}
    assert torch.equal(tensors["W_skip_1"], clt.w_skip[1]) and torch.equal(tensors["W_dec_1"], clt.w_dec[1])


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    wrote = atomic_folder.write_safetensors

    def stops(path: Path, tensors: Any) -> None:
        if path.name == "layer_1.safetensors":
            raise OSError("disk full")
        wrote(path, tensors)

    monkeypatch.setattr(atomic_folder, "write_safetensors", stops)
    with pytest.raises(OSError, match="disk full"):
        pc.transcoders.save(random_set(False), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    pc.transcoders.save(random_set(False), tmp_path / "set")
    with pytest.raises(FileExistsError, match="save: path must be a new folder, got"):
        pc.transcoders.save(random_set(False), tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="save: path must be in a folder that exists"):
        pc.transcoders.save(random_set(False), tmp_path / "no" / "set")
    with pytest.raises(TypeError, match="save: transcoders must be"):
        pc.transcoders.save({}, tmp_path / "new")  # type: ignore[arg-type]


def test_lazy_decoders_can_be_saved_again(tmp_path: Path) -> None:
    for cross in (False, True):
        expected = random_set(cross)
        pc.transcoders.save(expected, tmp_path / f"a{cross}")
        pc.transcoders.save(pc.transcoders.load(tmp_path / f"a{cross}"), tmp_path / f"b{cross}")
        assert_same(pc.transcoders.load(tmp_path / f"b{cross}"), expected)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "memory"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lazy: bool) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected, row = write(name, tmp_path / "set"), ROWS[name]
    recognised = pc.transcoders.recognise(tmp_path / "set")
    assert recognised.format.name == row.format and recognised.evidence in str(recognised)
    got = pc.transcoders.load(tmp_path / "set", lazy=lazy, **row.overrides)
    assert_same(got, expected)
    for a, b in zip(got.activation, expected.activation, strict=True):
        assert_same_rule(a, b, row.exact)
    assert_same_activity(got, expected)
    assert_same_graph(got, expected)


@pytest.mark.parametrize(
    "name",
    [
        "circuit_tracer",
        "circuit_tracer_cross",
        "gemma_scope",
        "gemma_scope_2",
        "saelens_jumprelu",
        "crosslayer",
        "crosslayer_batchtopk",
    ],
)
def test_at_the_threshold_itself_nothing_is_active(tmp_path: Path, name: str) -> None:
    """Encoders are the identity, so that a pre-activation can be put at, just above and just below its threshold."""
    row = ROWS[name]
    t = random_set(**row.holds)
    limits = torch.tensor([0.5, 0.25, 0.75, 0.5]) if row.holds.get("rule") is None else torch.full((4,), 0.6)
    for layer in range(LAYERS):
        t.w_enc[layer], t.b_enc[layer] = torch.eye(SIZE, WIDTH), torch.zeros(SIZE)
        if row.holds.get("rule") is None:
            t.activation[layer] = pc.JumpReLU(limits.repeat(SIZE // 4))
    (tmp_path / "set").mkdir()
    row.write(tmp_path / "set", t)
    got = pc.transcoders.load(tmp_path / "set", **row.overrides)
    every = limits.repeat(WIDTH // 4)
    x = torch.stack([every, every.nextafter(torch.tensor(9.0)), every.nextafter(torch.tensor(0.0))])
    for layer in range(LAYERS):
        assert got.encode(layer, x).row_ptr.diff().tolist() == [0, SIZE, 0]


@pytest.mark.parametrize("name", ["gemma_scope", "gemma_scope_2", "saelens_jumprelu", "crosslayer"])
def test_a_threshold_below_zero_is_that_of_a_relu(tmp_path: Path, name: str) -> None:
    """Their JumpReLUs come after a ReLU; circuit-tracer's does not."""
    for row, least in ((name, 0.0), ("circuit_tracer", -0.5)):
        t = random_set(**ROWS[row].holds)
        for layer in range(LAYERS):
            t.activation[layer] = pc.JumpReLU(torch.full((SIZE,), -0.5))
        (tmp_path / row).mkdir()
        ROWS[row].write(tmp_path / row, t)
        rules = pc.transcoders.load(tmp_path / row, **ROWS[row].overrides).activation
        assert [float(rule.theta.min()) for rule in rules] == [least] * LAYERS


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_llamascopium_by_decoder_norm_and_dataset_norm(tmp_path: Path, cross: bool, kind: str) -> None:
    """Against its own arithmetic: streams are divided by their mean norm, values compared times the decoder's norm."""
    t, inner, outer = llamascopium_by_norms(tmp_path / "set", cross, kind)
    got = pc.transcoders.load(tmp_path / "set")
    x = 3 * torch.randn(LAYERS, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    expected, active = torch.zeros(LAYERS, 6, WIDTH, dtype=torch.float64), []
    for layer in range(LAYERS):
        norm = t.w_dec[layer].double().flatten(1).norm(dim=1)
        pre = x[layer].double() * WIDTH**0.5 / inner[layer] @ t.w_enc[layer].double().T + t.b_enc[layer].double()
        active.append(t.activation[layer].active(pre * norm))
        acts = pre * active[layer]
        for target in range(layer, LAYERS) if cross else [layer]:
            expected[target] += acts @ (t.w_dec[layer][:, target - layer] if cross else t.w_dec[layer]).double()
    expected = (expected + torch.stack(t.b_dec).double()[:, None]) * outer[:, None, None] / WIDTH**0.5
    features = [got.encode(layer, x[layer]) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        rows = [features[layer].position(), features[layer].index]
        assert torch.equal(torch.stack(rows), active[layer].nonzero().T)
    assert torch.allclose(got.reconstruct(features).double(), expected, rtol=1e-4, atol=1e-4)
    assert_same_graph(got, pc.transcoders.load(tmp_path / "set", lazy=False))


@pytest.mark.parametrize("axis", ["Dimensionwise", "Layerwise"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_crosslayer_standardizers_are_folded_in(tmp_path: Path, cross: bool, axis: str) -> None:
    t, g = random_set(cross, skip=False, bias=cross), torch.Generator().manual_seed(4)
    shape = (LAYERS, WIDTH) if axis == "Dimensionwise" else (LAYERS,)
    standardizers = {
        f"{side}_standardizer.{name}": torch.rand(shape, generator=g) + (0.5 if name == "std" else 0.0)
        for side in ("input", "output")
        for name in ("mean", "std")
    }
    (tmp_path / "set").mkdir()
    crosslayer(tmp_path / "set", t, standardizers, axis)
    mean, std, mean_out, std_out = (v.double().view(LAYERS, 1, -1) for v in standardizers.values())
    x = 2 * torch.randn(LAYERS, 6, WIDTH, generator=g).double()
    expected, standard = torch.zeros_like(x), (x - mean) / std
    for layer in range(LAYERS):
        pre = standard[layer] @ t.w_enc[layer].double().T + t.b_enc[layer].double()
        acts = pre * t.activation[layer].active(pre)
        for target in range(layer, LAYERS) if cross else [layer]:
            expected[target] += acts @ (t.w_dec[layer][:, target - layer] if cross else t.w_dec[layer]).double()
    bias = torch.stack(t.b_dec).double()[:, None] if cross else 0.0
    got = pc.transcoders.load(tmp_path / "set", reads="mlp_in", writes="mlp_out", dtype=torch.float64)
    features = [got.encode(layer, x[layer]) for layer in range(LAYERS)]
    assert torch.allclose(got.reconstruct(features), (expected + bias) * std_out + mean_out, rtol=1e-5, atol=1e-5)


def test_an_unknown_folder_names_the_formats(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"must hold one of: circuit-tracer.*; got a folder with x\.json"):
        pc.transcoders.load(tmp_path / "other")


def test_registered_formats_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file with everything, tried before the others."""
    monkeypatch.setattr(detect, "FORMATS", dict(detect.FORMATS))
    expected = write("circuit_tracer", tmp_path / "set")

    def mine(folder: Path) -> str | None:
        return "a file of mine" if (folder / "mine").exists() else None

    def read(folder: Path, overrides: formats.Overrides) -> formats.Contents:
        return detect.FORMATS["circuit-tracer, per layer"].read(folder, overrides)

    row = pc.register_format("mine", mine, read)
    assert pc.transcoders.recognise(tmp_path / "set").format.name == "circuit-tracer, per layer"
    (tmp_path / "set" / "mine").write_text("")
    assert pc.transcoders.recognise(tmp_path / "set").format is row
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)
    with pytest.raises(TypeError, match=r"register_format: needs a name and two functions"):
        pc.register_format("mine", "found", read)  # type: ignore[arg-type]


def test_sharded_files(tmp_path: Path) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    for layer in range(LAYERS):
        path = tmp_path / "set" / f"layer_{layer}.safetensors"
        tensors, weight_map = load_file(path), {}
        for n, name in enumerate(sorted(tensors)):
            shard = f"layer_{layer}-0000{n % 2}-of-00002.safetensors"
            weight_map[name] = shard
            shard_path = tmp_path / "set" / shard
            save_file({**(load_file(shard_path) if shard_path.exists() else {}), name: tensors[name]}, shard_path)
        path.unlink()
        path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)
    index = tmp_path / "set" / "layer_1.safetensors.index.json"
    index_json = json.loads(index.read_text())
    index_json["weight_map"]["W_dec"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(index_json))
    with pytest.raises(ValueError, match=r"layer_1.safetensors.index.json must name files inside its folder"):
        pc.transcoders.load(tmp_path / "set")
    index_json["weight_map"]["W_dec"] = "layer_1-00009-of-00002.safetensors"
    index.write_text(json.dumps(index_json))
    with pytest.raises(FileNotFoundError, match=r"got no such file"):
        pc.transcoders.load(tmp_path / "set")
