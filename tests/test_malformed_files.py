"""Files that are no sound transcoders: each error names the file and what is wrong with it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import archive, array, cut, edit, pickled, rewrite
from format_files import write
from random_transcoders import LAYERS, SIZE, WIDTH
from safetensors.torch import load_file
from transcoder_checks import assert_same

import pycircuit as pc
from pycircuit.transcoders.formats import npz, stored_tensors

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


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


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "memory"])
@pytest.mark.parametrize("bad", BAD)
def test_malformed_files(tmp_path: Path, bad: str, lazy: bool) -> None:
    name, damage, message = BAD[bad]
    write(name, tmp_path / "set")
    damage(tmp_path / "set")
    if message is None:  # another name for the same place
        pc.transcoders.load(tmp_path / "set", lazy=lazy)
        return
    with pytest.raises((ValueError, TypeError, OSError), match=message) as caught:
        pc.transcoders.load(tmp_path / "set", lazy=lazy)
    assert str(caught.value).startswith("load: ")


@pytest.mark.parametrize("name", ["circuit_tracer", "circuit_tracer_cross"])
def test_a_decoder_that_is_not_finite_is_refused_as_its_row_is_read(tmp_path: Path, name: str) -> None:
    write(name, tmp_path / "set")
    path = tmp_path / "set" / ("W_dec_1.safetensors" if "cross" in name else "layer_1.safetensors")
    key = "W_dec_1" if "cross" in name else "W_dec"
    weights = load_file(path)[key]
    weights[3] = torch.nan
    edit(path, **{key: weights})
    got = pc.transcoders.load(tmp_path / "set")
    features = pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1))
    with pytest.raises(ValueError, match=rf"{key} must hold finite numbers, got NaN or infinity in row 3"):
        pc.ops.decode(features, got.w_dec[1])
    with pytest.raises(ValueError, match=rf"{key} must hold finite numbers, got NaN or infinity in row 3"):
        pc.transcoders.load(tmp_path / "set", lazy=False)


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


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
@pytest.mark.parametrize("bad", ARCHIVES)
def test_malformed_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, method: int) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(npz, "_SMALL_BYTES", 1 << 20)
    if bad == "bomb" and method == zipfile.ZIP_STORED:
        return  # what is stored as it is does not grow
    (tmp_path / "layer_0").mkdir()
    archive(tmp_path / "layer_0" / "params.npz", *ARCHIVES[bad][0], method=method)
    with pytest.raises((ValueError, TypeError), match=ARCHIVES[bad][1]):
        pc.transcoders.load(tmp_path)
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
        pc.transcoders.load(tmp_path / "set")
    archive(tmp_path / "large.npz", ("W_enc.npy", array(20_000) + bytes(80_000)), method=zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "large.npz").read_bytes())
    data[50_000] = 4
    (tmp_path / "large.npz").write_bytes(data)
    for read in (stored_tensors.StoredTensor.read, stored_tensors.StoredTensor.mapped):
        with pytest.raises(ValueError, match=r"large\.npz: W_enc must have the checksum \w{8}, got"):
            read(npz.open_npz(tmp_path / "large.npz")["W_enc"])


def test_archives_whose_members_together_are_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr(npz, "_SMALL_BYTES", 1 << 20)
    (tmp_path / "set" / "layer_0").mkdir(parents=True)
    members = [(f"a{n}.npy", array(2**17) + bytes(2**19)) for n in range(8)]
    archive(tmp_path / "set" / "layer_0" / "params.npz", *members)
    with pytest.raises(ValueError, match=r"params\.npz must unpack to at most 64 times its size, got .*is it a bomb"):
        pc.transcoders.load(tmp_path / "set")
    assert not own_cache.exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_archives_packed_as_numpy_never_does(tmp_path: Path, method: int) -> None:
    (tmp_path / "layer_0").mkdir()
    archive(tmp_path / "layer_0" / "params.npz", ("W_enc.npy", array(2) + bytes(8)), method=method)
    with pytest.raises(ValueError, match=rf"W_enc must be stored or deflated, got zip's method {method}"):
        pc.transcoders.load(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("x: [" + "a, " * 60_000 + "]", "must be a configuration of at most 131072 bytes"),
        ("transcoders: {0: layer_0.safetensors, 00: layer_1.safetensors}", "a name twice, in two ways of writing it"),
        ("<<: {model_kind: cross_layer_transcoder}", "a name twice, in two ways"),
        (f"transcoders: [{'a' * 4000}, layer_0.safetensors]", r"config\.yaml names a{200}, which must be in"),
        (
            "pycircuit: {layers: 3, features: [24, 24, 24], activation: {activation: batchtopk, threshold: "
            + "9" * 400 + "}}",
            "threshold must be a finite number",
        ),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(tmp_path: Path, more: str, message: str) -> None:
    write("circuit_tracer", tmp_path / "set")
    config = tmp_path / "set" / "config.yaml"
    config.write_text(config.read_text() + more + "\n")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        pc.transcoders.load(tmp_path / "set")
    assert str(caught.value).startswith("load: ") and len(str(caught.value)) < 1000


def test_configurations_that_windows_wrote(tmp_path: Path) -> None:
    for name, end in (("circuit_tracer", "*.yaml"), ("saelens", "cfg.json"), ("gemma_scope_2", "config.json")):
        expected = write(name, tmp_path / name)
        for path in (tmp_path / name).rglob(end):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert_same(pc.transcoders.load(tmp_path / name), expected)


@pytest.mark.parametrize(("size", "width", "message"), [(0, WIDTH, "at least one feature"), (SIZE, 0, "a width of at")])
def test_empty_tensors_are_refused(tmp_path: Path, size: int, width: int, message: str) -> None:
    write("circuit_tracer_relu", tmp_path / "set")
    none = {"W_enc": torch.zeros(size, width), "W_dec": torch.zeros(size, width), "b_enc": torch.zeros(size)}
    for layer in range(LAYERS):
        skip = torch.zeros(width, width)
        edit(tmp_path / "set" / f"layer_{layer}.safetensors", **none, b_dec=torch.zeros(width), W_skip=skip)
    with pytest.raises(ValueError, match=rf"load: .*layer_0\.safetensors: W_enc must have {message}"):
        pc.transcoders.load(tmp_path / "set")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    edit(tmp_path / "set" / "layer_1.safetensors", W_enc=expected.w_enc[1].to(kind))
    with pytest.raises(TypeError, match=r"load: .*layer_1\.safetensors: W_enc must be one of F64, .*, got F8_E"):
        pc.transcoders.load(tmp_path / "set")


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "activation_function.threshold", "W_skip"])
def test_a_type_that_is_too_small_for_a_number(tmp_path: Path, name: str) -> None:
    """It would become infinite, and quietly."""
    write("circuit_tracer", tmp_path / "set")
    path = tmp_path / "set" / "layer_1.safetensors"
    weights = load_file(path)[name]
    weights.view(-1)[-1] = -1e6 if name != "activation_function.threshold" else 1e6
    edit(path, **{name: weights})
    message = rf"layer_1\.safetensors: {name} must hold numbers of torch\.float16, whose largest is 65504, got -?1e\+06"
    with pytest.raises(ValueError, match=message):
        pc.transcoders.load(tmp_path / "set", dtype=torch.float16, lazy=False)
    assert pc.transcoders.load(tmp_path / "set", dtype=torch.bfloat16, lazy=False).depth == LAYERS
    if name == "W_dec":
        rows = pc.transcoders.load(tmp_path / "set", dtype=torch.float16).w_dec[1]
        assert rows[torch.tensor([0])].dtype == torch.float16
        with pytest.raises(ValueError, match=message):
            pc.ops.decode(pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([SIZE - 1]), torch.ones(1)), rows)
