"""Layers, sets and hook points that the arguments of load select."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from format_files import ROWS, write
from random_transcoders import LAYERS, random_set
from safetensors.torch import save_file
from transcoder_checks import assert_same

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["circuit_tracer", "gemma_scope", "sparsify", "saelens", "llamascopium"])
def test_layers_without_files(tmp_path: Path, name: str) -> None:
    """Files for some layers only, and the model's number of layers said."""
    expected = write(name, tmp_path / "set")
    marks = {
        "circuit_tracer": "layer_1.",
        "gemma_scope": "layer_1/",
        "sparsify": "layers.1.",
        "saelens": "name-2/",
        "llamascopium": "layer1_",
    }
    for path in sorted((tmp_path / "set").rglob("*")):
        if path.is_file() and marks[name] in path.as_posix():
            path.unlink()
    got = pc.transcoders.load(tmp_path / "set", layers=LAYERS + 1)
    assert got.depth == LAYERS + 1 and [w is None for w in got.w_enc] == [False, True, False, True]
    assert torch.equal(got.w_enc[2], expected.w_enc[2])
    with pytest.raises(FileNotFoundError, match=r"of layer 1, got none; say layers="):
        pc.transcoders.load(tmp_path / "set")
    with pytest.raises(ValueError, match=r"load: layers must be at least 3"):
        pc.transcoders.load(tmp_path / "set", layers=2)
    with pytest.raises(ValueError, match=r"load: layers must be a whole number of at least 1 and at most 10000, got 0"):
        pc.transcoders.load(tmp_path / "set", layers=0)


def test_variant_selects_one_of_several_sets(tmp_path: Path) -> None:
    for size, seed in (("16k", 1.0), ("65k", 2.0)):
        t = random_set(False, skip=False)
        t.w_enc = [w * seed for w in t.w_enc]
        for layer in range(LAYERS):
            inner = tmp_path / "transcoder_all" / f"layer_{layer}_width_{size}_l0_small"
            inner.mkdir(parents=True)
            tensors = {
                "w_enc": t.w_enc[layer].T,
                "w_dec": t.w_dec[layer],
                "b_enc": t.b_enc[layer],
                "b_dec": t.b_dec[layer],
                "threshold": t.activation[layer].theta,
            }
            save_file({k: v.contiguous() for k, v in tensors.items()}, inner / "params.safetensors")
    with pytest.raises(ValueError, match=r"variant must leave one file for layer 0 .* got 2: .*layer_0_width_16k"):
        pc.transcoders.load(tmp_path)
    with pytest.raises(ValueError, match=r"variant must leave some of .* got '1m'"):
        pc.transcoders.load(tmp_path, variant="1m")
    assert torch.equal(pc.transcoders.load(tmp_path, variant="width_65k").w_enc[0], 2 * random_set(False).w_enc[0])
    assert torch.equal(pc.transcoders.load(tmp_path, variant="16k, small").w_enc[0], random_set(False).w_enc[0])


def test_hook_points_that_no_file_says(tmp_path: Path) -> None:
    write("crosslayer", tmp_path / "set")
    with pytest.raises(ValueError, match=r"load: reads must be given for .* whose files do not say it, got None"):
        pc.transcoders.load(tmp_path / "set")
    with pytest.raises(ValueError, match=r"load: writes must be one of mlp_out, mlp_raw, or a hook's name, got 'out'"):
        pc.transcoders.load(tmp_path / "set", reads="mlp_in", writes="out")
    write("circuit_tracer", tmp_path / "other")
    assert pc.transcoders.load(tmp_path / "other", reads="mlp_normed").reads == "mlp_normed"


@pytest.mark.parametrize("name", ["crosslayer", "llamascopium_cross"])
def test_layers_must_match_a_set_that_knows_them(tmp_path: Path, name: str) -> None:
    expected, overrides = write(name, tmp_path / "set"), ROWS[name].overrides
    assert_same(pc.transcoders.load(tmp_path / "set", layers=LAYERS, **overrides), expected)
    for layers in (LAYERS - 1, LAYERS + 4):
        with pytest.raises(ValueError, match=rf"layers must be the number that the files are for, got {layers}, an"):
            pc.transcoders.load(tmp_path / "set", layers=layers, **overrides)
    with pytest.raises(ValueError, match=r"layers must be a whole number of at least 1 and at most 10000, got 1000"):
        pc.transcoders.load(tmp_path / "set", layers=10**9, **overrides)


def test_a_set_beside_its_affine_twin(tmp_path: Path) -> None:
    """Names that begin alike, as in the published folder."""
    plain, affine = random_set(False, skip=False), random_set(False)
    for t in (plain, affine):
        ROWS["gemma_scope_2"].write(tmp_path, t)
    with pytest.raises(ValueError, match=r"variant must leave one file for layer 0 .*'16k, small, not affine'"):
        pc.transcoders.load(tmp_path, variant="16k,l0_small")
    assert pc.transcoders.load(tmp_path, variant="16k, l0_small, not affine").w_skip == [None] * LAYERS
    assert torch.equal(pc.transcoders.load(tmp_path, variant="affine").w_skip[1], affine.w_skip[1])
    for nothing in ("", "16", "not small", "w_16k"):
        with pytest.raises(ValueError, match=r"variant must leave some of"):
            pc.transcoders.load(tmp_path, variant=nothing)
    with pytest.raises(TypeError, match=r"load: variant must be parts of a path, with commas, got \['16k'\]"):
        pc.transcoders.load(tmp_path, variant=["16k"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["saelens", "llamascopium"])
def test_variants_of_every_format(tmp_path: Path, name: str) -> None:
    expected = write(name, tmp_path / "w8" / "k5")
    shutil.copytree(tmp_path / "w8", tmp_path / "w18")
    assert_same(pc.transcoders.load(tmp_path, variant="w8, k5"), expected)
    assert_same(pc.transcoders.load(tmp_path, variant="w8/k5"), expected)
    assert_same(pc.transcoders.load(tmp_path, variant="not w18"), expected)
    with pytest.raises(ValueError, match="variant must leave one file for layer"):
        pc.transcoders.load(tmp_path, variant="k5")


def test_wrong_arguments_of_load(tmp_path: Path) -> None:
    for path in (None, b"set", 3):
        with pytest.raises(TypeError, match="load: path must be a folder or a hub id"):
            pc.transcoders.load(path)  # type: ignore[arg-type]
    write("circuit_tracer", tmp_path / "set")
    for arguments, message in (
        ({"dtype": "bfloat16"}, "load: dtype must be float64, float32, bfloat16 or float16 of torch, got 'bfloat16'"),
        ({"dtype": torch.float8_e4m3fn}, "load: dtype must be .* got torch.float8_e4m3fn"),
        ({"device": "nowhere"}, "load: device must be such as 'cpu' or 'cuda:0', got 'nowhere'"),
        ({"cache": "9" * 400}, "load: cache must be bytes or a size such as '8GiB'"),
    ):
        with pytest.raises(ValueError, match=message):
            pc.transcoders.load(tmp_path / "set", **arguments)  # type: ignore[arg-type]
