"""Providers of float32 products: right whichever runs, and chosen once per machine by measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build, prompt, replacement
from torch import Tensor

import pycircuit as pc
from pycircuit.model.linear_layers import FastLinearLayers
from pycircuit.ops import products
from pycircuit.ops.products import available, product

SHAPES = [(1, 1, 1), (7, 5, 3), (64, 96, 17), (130, 64, 200), (257, 33, 48)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing measured yet."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path))
    monkeypatch.delenv(products.ENVIRONMENT, raising=False)
    monkeypatch.setattr(products, "_rates", {})
    return tmp_path


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_autocast_decides_the_type_of_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCIRCUIT_PRODUCT", "native")
    layer, x = torch.nn.Linear(8, 8), torch.ones(3, 8)
    with torch.no_grad(), FastLinearLayers(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("provider", available())
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_provider_computes_the_product(
    provider: str, transposed: bool, add: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provider in products.available(), f"{provider} is gone from this torch: see pycircuit/ops/products.py"
    monkeypatch.setenv(products.ENVIRONMENT, provider)
    n, inner, columns = shape
    a, divisor = normal(n, inner + 3)[:, :inner], normal(n, seed=1).abs() + 0.5
    b = normal(columns, inner, seed=2).T if transposed else normal(inner, columns, seed=2)
    out = normal(n, columns + 2, seed=3)[:, :columns]
    before, wide = out.double(), a.double() / divisor.double()[:, None]
    expected = wide @ b.double() + (before if add else 0)
    result = product(a, b, out, add, divisor)
    assert result is out
    scale = wide.abs() @ b.double().abs() + before.abs()
    assert float(((out.double() - expected).abs() / scale).max()) < 1e-6


def test_the_first_product_of_a_class_measures_every_provider(own_cache: Path) -> None:
    a, b = normal(100, 64), normal(64, 64)
    product(a, b)
    [(shape, rates)] = products.measured().items()
    assert shape == products.shape_class(a, b)
    assert set(rates) == set(products.available()) and all(rate > 0 for rate in rates.values())
    [path] = (own_cache / "products").glob("*.json")
    assert list(json.loads(path.read_text()).values()) == [rates]


def test_a_later_process_does_not_measure_again(own_cache: Path) -> None:
    product(normal(100, 64), normal(64, 64))
    [path] = (own_cache / "products").glob("*.json")
    entries = json.loads(path.read_text())
    for rates in entries.values():
        rates.update(dict.fromkeys(rates, 1.0), onednn=2.0)
    path.write_text(json.dumps(entries))
    code = (
        "import torch; from pycircuit.ops import products as p; p.measure = None; "
        "print(p.provider_of(torch.ones(100, 64), torch.ones(64, 64)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "onednn", done.stderr


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"3 3": {}}'])
def test_a_damaged_file_is_measured_anew(own_cache: Path, text: str) -> None:
    a, b = normal(100, 64), normal(64, 64)
    product(a, b)
    [path] = (own_cache / "products").glob("*.json")
    path.write_text(text)
    products._rates.clear()
    product(a, b)
    assert list(json.loads(path.read_text()).values()) == list(products._rates.values())


def test_a_machine_without_a_cache_folder_measures_in_memory(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_cache / "file").write_text("")
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(own_cache / "file"))
    a, b = normal(100, 64), normal(64, 64)
    assert torch.allclose(product(a, b), a @ b, atol=1e-4)
    assert list(products.measured()) == [products.shape_class(a, b)]


def test_ours_runs_unless_another_is_clearly_faster() -> None:
    assert products.fastest({"native": 1.0, "onednn": 1.05, "torch": 0.5}) == "native"
    assert products.fastest({"native": 1.0, "onednn": 1.5, "torch": 2.0}) == "torch"
    assert products.fastest({"native": 3.0, "onednn": 1.0, "torch": 2.0}) == "native"
    assert products.fastest({"native": 1.0, "amx": 1.4}) == "native"
    if "amx" in products.available():
        assert products.fastest({"native": 1.0, "amx": 2.0, "torch": 1.2}) == "amx"
        with pc.use("native", isa="v4"):
            assert products.fastest({"native": 1.0, "amx": 2.0}) == "native"


def test_a_provider_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(100, 64), normal(64, 64)
    monkeypatch.setenv(products.ENVIRONMENT, "onednn")
    assert products.provider_of(a, b) == "onednn"
    with pc.use("reference"):
        assert products.provider_of(a, b) == "torch"
    monkeypatch.setenv(products.ENVIRONMENT, "blas")
    with pytest.raises(ValueError, match="PYCIRCUIT_PRODUCT must be one of native, amx, onednn, torch, got 'blas'"):
        product(a, b)


@pytest.mark.parametrize(
    "a, b",
    [
        (normal(9, 8).double(), normal(8, 4).double()),
        (normal(9, 8), normal(8, 4).bfloat16()),
        (normal(8, 9).T, normal(8, 4)),
        (normal(0, 8), normal(8, 4)),
        (normal(9, 0), normal(0, 4)),
    ],
    ids=["float64", "bfloat16 weight", "transposed rows", "no rows", "no inner"],
)
def test_other_products_are_torchs(a: Tensor, b: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.ENVIRONMENT, "native")
    assert products.provider_of(a, b) == "torch"
    assert torch.equal(product(a, b), a @ b.to(a.dtype))


def test_a_gradient_passes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.ENVIRONMENT, "native")
    a, weight = normal(9, 8).requires_grad_(), normal(4, 8)
    with FastLinearLayers():
        torch.nn.functional.linear(a, weight).sum().backward()
    assert a.grad is not None and torch.allclose(a.grad, weight.sum(0).expand(9, 8), atol=1e-6)


@pytest.mark.parametrize("provider", available())
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_model_gives_the_logits_it_gives_by_torch(provider: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        calls: list[Any] = []
        monkeypatch.setenv(products.ENVIRONMENT, provider)
        counted = {p: _counting(calls, f) for p, f in products._PRODUCTS.items()}
        monkeypatch.setattr(products, "_PRODUCTS", counted)
        with FastLinearLayers():
            logits = model(input_ids=ids).logits
    assert bool(calls) == (provider != "torch")
    assert float((logits - expected).norm() / expected.norm()) < 1e-5


def _counting(calls: list[Any], function: Any) -> Any:
    def counted(*args: Any) -> None:
        calls.append(args)
        function(*args)

    return counted


@pytest.mark.parametrize("provider", available())
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_law_holds_with_every_provider(provider: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.ENVIRONMENT, provider)
    graph = pc.attribute(replacement(name, "plt", torch.float32), prompt(20), progress=False)
    assert graph.certificate < 1e-5
