"""Files that other libraries write, loaded by us next to what they compute; and ours, loaded by them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU as CircuitTracerJumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder as CircuitTracerCrossLayer
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from torch import Tensor

import pycircuit as pc

LAYERS, WIDTH, SIZE, POSITIONS = 3, 16, 40, 7
CPU = torch.device("cpu")


def filled(module: Any, seed: int) -> Any:
    """Every parameter random; thresholds positive."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise.abs() / 2 if "threshold" in name else noise / 3)
    return module


def streams() -> Tensor:
    return torch.randn(LAYERS, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(9))


def dense(result: pc.SparseFeatures, size: int = SIZE) -> Tensor:
    out = torch.zeros(result.positions, size)
    out[result.position(), result.index] = result.value
    return out


def agree(ours: Any, acts: Tensor, written: Tensor) -> None:
    """acts: [layers, positions, features]; written: [layers, positions, width]; as the owner computes them."""
    x = streams()
    result = [ours.encode(index, x[index]) for index in range(LAYERS)]
    assert sum(f.count for f in result) > 20
    for index in range(LAYERS):
        torch.testing.assert_close(dense(result[index]), acts[index], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(result, x), written, rtol=1e-5, atol=1e-4)


def config(folder: Path, kind: str) -> None:
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_name: tiny\nmodel_kind: {kind}\n{hooks}scan: tiny\n")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jumps", [False, True])
@torch.no_grad()
def test_circuit_tracer_per_layer(tmp_path: Path, jumps: bool, skip: bool) -> None:
    result = {}
    for index in range(LAYERS):
        rule = CircuitTracerJumpReLU(torch.zeros(SIZE), 0.1) if jumps else torch.nn.functional.relu
        item = SingleLayerTranscoder(WIDTH, SIZE, rule, index, skip, device=CPU, dtype=torch.float32)
        result[index] = filled(item, index)
    theirs = TranscoderSet(result, "hook_resid_mid", "hook_mlp_out")
    theirs.to_safetensors(str(tmp_path))
    config(tmp_path, "transcoder_set")
    acts = theirs.encode(streams())
    agree(pc.transcoders.load(tmp_path), acts, theirs.decode(acts, streams()))


@pytest.mark.parametrize("rule", ["relu", "jump_relu"])
@torch.no_grad()
def test_circuit_tracer_cross_layer(tmp_path: Path, rule: str) -> None:
    """0.5.0 writes no skip."""
    theirs = CircuitTracerCrossLayer(LAYERS, SIZE, WIDTH, rule, False, False, device=CPU, dtype=torch.float32)
    filled(theirs, 0).to_safetensors(str(tmp_path))
    config(tmp_path, "cross_layer_transcoder")
    acts = theirs.encode(streams())
    agree(pc.transcoders.load(tmp_path), acts, theirs.decode(acts, streams()))


def ours(cross: bool, rule: Any, skip: bool) -> Any:
    g = torch.Generator().manual_seed(4)

    def random_tensors(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=g) / 3 for _ in range(LAYERS)]

    w_dec = [torch.randn(SIZE, *[LAYERS - n] * cross, WIDTH, generator=g) / 3 for n in range(LAYERS)]
    made = pc.CrossLayerTranscoder if cross else pc.PerLayerTranscoders
    w_skip = random_tensors(WIDTH, WIDTH) if skip else None
    return made(
        random_tensors(SIZE, WIDTH), random_tensors(SIZE), w_dec, random_tensors(WIDTH), rule, w_skip, reads="resid_mid"
    )


RULES = {"relu": pc.ReLU(), "jumprelu": pc.JumpReLU(torch.linspace(0.1, 1, SIZE)), "batchtopk": pc.BatchTopK(0.7)}


@pytest.mark.parametrize("lazy", [False, True], ids=["memory", "lazy"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
@torch.no_grad()
def test_ours_in_circuit_tracer(tmp_path: Path, cross: bool, rule: str, lazy: bool) -> None:
    t = ours(cross, RULES[rule], skip=not cross)
    folder = pc.transcoders.save(t, tmp_path / "set", model="tiny")
    options = {"device": CPU, "dtype": torch.float32, "lazy_decoder": lazy, "lazy_encoder": lazy}
    if cross:
        theirs = load_clt(str(folder), **options)
    else:
        files = {index: str(folder / f"layer_{index}.safetensors") for index in range(LAYERS)}
        theirs = load_transcoder_set(files, "scan", "hook_resid_mid", "hook_mlp_out", **options)
    acts = theirs.encode(streams())
    agree(t, acts, theirs.decode(acts, streams()))


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"])
@torch.no_grad()
def test_saelens(tmp_path: Path, name: str) -> None:
    """Theirs loaded by us, and what we make of it loaded by them."""
    transcoder = pytest.importorskip("sae_lens.saes.transcoder", reason="sae-lens is not installed")
    made = []
    for index in range(LAYERS):
        hooks = {"hook_name": f"blocks.{index}.hook_resid_mid", "hook_name_out": f"blocks.{index}.hook_mlp_out"}
        settings = {"d_in": WIDTH, "d_sae": SIZE, "d_out": WIDTH, "apply_b_dec_to_input": False, "metadata": hooks}
        kind = getattr(transcoder, name)
        item = filled(kind(getattr(transcoder, f"{name}Config").from_dict(settings)), index)
        item.save_model(tmp_path / "set" / f"any{index}")
        made.append(item.eval())
    x = streams()
    acts = torch.stack([item.encode(x[index]) for index, item in enumerate(made)])
    written = torch.stack([item(x[index]) for index, item in enumerate(made)])
    agree(pc.transcoders.load(tmp_path / "set"), acts, written)
    pc.transcoders.convert(tmp_path / "set", tmp_path / "back", "saelens")
    for index, item in enumerate(made):
        again = type(item).load_from_disk(tmp_path / "back" / f"layer_{index}")
        assert type(again) is type(item)
        torch.testing.assert_close(again(x[index]), written[index])


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_sparsify(tmp_path: Path, skip: bool) -> None:
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    x, acts, written = streams(), torch.zeros(LAYERS, POSITIONS, SIZE), torch.zeros(LAYERS, POSITIONS, WIDTH)
    for i in range(LAYERS):
        settings = sparsify.SparseCoderConfig(num_latents=SIZE, k=5, transcode=True, skip_connection=skip)
        item = filled(sparsify.SparseCoder(WIDTH, settings, dtype=torch.float32), i)
        item.save_to_disk(tmp_path / f"layers.{i}.mlp")
        pre = torch.relu(item.encoder(x[i]))
        top, index = pre.topk(5, dim=-1)
        acts[i].scatter_(1, index, top)
        written[i] = item.decode(top, index) + (x[i] @ item.W_skip.mT if skip else 0.0)
    agree(pc.transcoders.load(tmp_path), acts, written)


def scopium_settings(rule: str, by_norm: bool, norm: str) -> dict[str, Any]:
    return {"d_model": WIDTH, "expansion_factor": SIZE / WIDTH, "act_fn": rule, "top_k": 5, "norm_activation": norm,
            "sparsity_include_decoder_norm": by_norm}  # fmt: skip


def saved(item: Any, folder: Path, norms: dict[str, float]) -> None:
    item.set_dataset_average_activation_norm(norms)
    item.save_pretrained(folder)
    item.cfg.save_hyperparameters(folder)


def scaled(item: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors of its hook points."""
    return item.normalize_activations(x, return_scale_factor=True)[1]


@pytest.mark.parametrize("norm", ["inference", "dataset-wise"])
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk"])
@torch.no_grad()
def test_llamascopium_per_layer(tmp_path: Path, rule: str, by_norm: bool, norm: str) -> None:
    sae = pytest.importorskip("llamascopium.models.sae", reason="llamascopium is not installed")
    x, written, acts = streams(), torch.zeros(LAYERS, POSITIONS, WIDTH), torch.zeros(LAYERS, POSITIONS, SIZE)
    for index in range(LAYERS):
        hooks = [f"blocks.{index}.ln2.hook_normalized", f"blocks.{index}.hook_mlp_out"]
        settings = scopium_settings(rule, by_norm, norm)
        item = sae.SparseAutoEncoder(sae.SAEConfig(hook_point_in=hooks[0], hook_point_out=hooks[1], **settings))
        item = filled(item, index).eval()
        saved(item, tmp_path / f"layer{index}_transcoder", dict(zip(hooks, (3.0, 7.0), strict=True)))
        by = scaled(item, {hooks[0]: x[index], hooks[1]: x[index]})
        acts[index] = item.encode(x[index] * by[hooks[0]])
        written[index] = item.decode(acts[index]) / by[hooks[1]]
        if by_norm and rule == "topk":
            acts[index] *= item.decoder_norm()
    ours = pc.transcoders.load(tmp_path)
    assert (ours.reads, ours.writes) == ("mlp_normed", "mlp_out")
    agree(ours, acts, written)


@pytest.mark.parametrize("norm", ["inference", "dataset-wise"])
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk"])
@torch.no_grad()
def test_llamascopium_cross_layer(tmp_path: Path, rule: str, by_norm: bool, norm: str) -> None:
    clt = pytest.importorskip("llamascopium.models.clt", reason="llamascopium is not installed")
    x, hooks = (
        streams(),
        [[f"blocks.{index}.{name}" for index in range(LAYERS)] for name in ("hook_resid_mid", "hook_mlp_out")],
    )
    settings = scopium_settings(rule, by_norm, norm)
    item = clt.CrossLayerTranscoder(clt.CLTConfig(hook_points_in=hooks[0], hook_points_out=hooks[1], **settings))
    item = filled(item, 0).eval()
    saved(item, tmp_path, dict(zip([*hooks[0], *hooks[1]], (3.0, 5.0, 2.0, 7.0, 0.5, 4.0), strict=True)))
    by = scaled(item, {name: x[0] for side in hooks for name in side})
    gains = [torch.stack([by[name].reshape(()) for name in side])[:, None, None] for side in hooks]
    acts = item.encode((x * gains[0]).transpose(0, 1))
    written = item.decode(acts) / gains[1]
    values = acts.transpose(0, 1)
    if by_norm and rule == "topk":
        values = values * item.decoder_norm_per_feature()[:, None]
    agree(pc.transcoders.load(tmp_path), values, written)
