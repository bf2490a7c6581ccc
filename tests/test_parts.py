"""Native ops on numbers in bfloat16 parts, by AMX and by AVX512_BF16, and traces of which they are a part."""

from __future__ import annotations

import dataclasses
from typing import Any

import builders
import pytest
import torch
from op_forms import ISAS
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import cases, native, reference
from pycircuit.ops.dispatch import PARTS_ISAS, multiplies_bfloat16
from pycircuit.trace.precision import PRECISIONS

USABLE = [isa for isa in ISAS if isa in PARTS_ISAS]
every_isa = pytest.mark.parametrize("isa", USABLE or ["none here"])
ROUNDING = {1: 2.0**-8, 2: 2.0**-15}  # relative to the length of the result


@pytest.fixture(autouse=True)
def instructions(request: pytest.FixtureRequest) -> None:
    if not USABLE and "isa" in request.fixturenames:
        pytest.skip("needs AVX512_BF16")


def doubled(value: Any) -> Any:
    """The tensors of an attention in float64."""
    if isinstance(value, Tensor):
        return value.double()
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: doubled(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return type(value)(**fields)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm().clip(1e-30))


@every_isa
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", cases.CASES["attend_back"])
def test_attend_back(isa: str, parts: int, case: str) -> None:
    y, prefix_ptr, attention, _ = cases.CASES["attend_back"][case](torch.Generator().manual_seed(0))
    truth = reference.attend_back(y.double(), prefix_ptr, doubled(attention), None)
    with pc.use("native", isa=isa):
        assert off(native.attend_back(y, prefix_ptr, attention, None, parts), truth) < ROUNDING[parts]


@every_isa
@pytest.mark.parametrize("width", [5, 32, 40, 64, 100])
def test_attend_back_beyond_a_block(isa: str, width: int) -> None:
    """Several blocks of keys and queries, targets that end within them, and two heads of a group."""
    lengths = torch.tensor([0, 700, 33, 193, 1, 256])
    prefix_ptr, pattern = lengths.cumsum(0), normal((4, 700, 700), 1).softmax(-1).tril()
    y, attention = normal((int(lengths.sum()), 4, width), 2), pc.ops.StoredAttention(pattern, 2)
    truth = reference.attend_back(y.double(), prefix_ptr, doubled(attention), None)
    with pc.use("native", isa=isa):
        for parts, rounding in ROUNDING.items():
            assert off(native.attend_back(y, prefix_ptr, attention, None, parts), truth) < rounding


@every_isa
@pytest.mark.parametrize("precision", ["float32-fast", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_traces_keep_the_law(isa: str, precision: Any, family: str) -> None:
    """Within the precision's tolerance, near float32's rows, and not float32 itself."""
    model = builders.replacement(family, "plt", torch.float32)
    options: dict[str, Any] = {"max_features": 20, "max_targets": 2, "labels": False, "progress": False}
    with pc.use("native", isa=isa):
        exact = pc.attribute(model, builders.prompt(40), **options)
        graph = pc.attribute(model, builders.prompt(40), precision=precision, **options)
    assert graph.certificate < graph.provenance["tolerance"] == PRECISIONS[precision].tolerance
    targets = exact.row_node[:2]  # outputs come first
    distance = off(graph.dense()[targets], exact.dense()[targets])
    assert 0 < distance < (1e-4 if precision == "float32-fast" else 3e-2)


@every_isa
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("add", [False, True])
def test_an_element_does_not_depend_on_others(isa: str, parts: int, add: bool) -> None:
    """Whatever block it falls into; 601 numbers are several blocks of the depth."""
    a, b, before = normal((70, 601), 3), normal((50, 601), 4).T, normal((70, 50), 5)
    with pc.use("native", isa=isa):
        product = native.product(a, b, before.clone(), add, parts=parts)
        for row in (0, 31, 32, 69):
            rows = slice(row, row + 1)
            assert torch.equal(native.product(a[rows], b, before[rows].clone(), add, parts=parts), product[rows])
        columns = native.product(a, b[:, 3:20], before[:, 3:20].clone(), add, parts=parts)
        assert torch.equal(columns, product[:, 3:20])


@every_isa
@pytest.mark.parametrize("window", [0, 100, 300])
def test_recomputed_attention_beyond_a_block(isa: str, window: int) -> None:
    lengths = torch.tensor([0, 500, 33, 193, 256])
    query, key = normal((4, 500, 24), 6), normal((2, 500, 24), 7)
    attention = pc.ops.RecomputedAttention(query, key, torch.full((4, 500), 5.0), 0.2, window=window)
    y = normal((int(lengths.sum()), 4, 40), 8)
    truth = reference.attend_back(y.double(), lengths.cumsum(0), doubled(attention), None)
    with pc.use("native", isa=isa):
        for parts, rounding in ROUNDING.items():
            assert off(native.attend_back(y, lengths.cumsum(0), attention, None, parts), truth) < rounding


@every_isa
def test_a_linear_path_of_another_type(isa: str) -> None:
    """A skip stored as bfloat16 beside a float32 model."""
    model = builders.replacement("llama", "plt_skip", torch.float32)
    model.transcoders.w_skip = [w.bfloat16() for w in model.transcoders.w_skip]
    with pc.use("native", isa=isa):
        graph = pc.attribute(model, builders.prompt(20), max_features=4, progress=False, precision="float32-fast")
    assert graph.certificate < 1e-5


def test_other_isas_refuse() -> None:
    a = normal((3, 4), 5)
    y, prefix_ptr = normal((2, 1, 4), 6), torch.tensor([0, 2])
    attention = pc.ops.StoredAttention(torch.eye(2)[None], 1)
    with pc.use("native", isa="baseline"):
        assert not multiplies_bfloat16()
        with pytest.raises(RuntimeError, match="product: this ISA multiplies no bfloat16 parts"):
            native.product(a, a.T, torch.empty(3, 3), parts=1)
        with pytest.raises(RuntimeError, match="attend_back: this ISA multiplies no bfloat16 parts"):
            native.attend_back(y, prefix_ptr, attention, None, 1)
