"""Precision of the sweep's products: the GPU's arithmetic emulated on a CPU, against the law and a float64 sweep."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from torch import Tensor

import pycircuit as pc
from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops.dispatch import multiplies_bfloat16
from pycircuit.ops.torch_settings import full_float32, tf32_products
from pycircuit.trace import trace_options
from pycircuit.trace.memory_model import MemoryModel, TraceSize
from pycircuit.trace.precision import FLOAT32, PRECISIONS, Arithmetic, Products, arithmetic_of
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WIDTH, POSITIONS, ROWS, SIZE = 26, builders.WIDTH, 12, 40, 24
LOW = ("tf32", "bfloat16")
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
FAMILIES: dict[str, dict[str, Any]] = {"gemma2": _WINDOWS, "llama": {}}


def deep_model(family: str) -> pc.ReplacementModel:
    """26 random layers; the transcoders of the Llama have a skip."""
    g = torch.Generator().manual_seed(4)

    def normal(*shape: int, scale: float) -> list[Tensor]:
        return [torch.randn(*shape, generator=g) * scale for _ in range(LAYERS)]

    language = builders.build(family, num_hidden_layers=LAYERS, **FAMILIES[family])
    w_enc, w_dec = normal(SIZE, WIDTH, scale=WIDTH**-0.5), normal(SIZE, WIDTH, scale=0.3)
    skip = normal(WIDTH, WIDTH, scale=0.2 / WIDTH**0.5) if family == "llama" else None
    b_enc, b_dec = normal(SIZE, scale=0.01), normal(WIDTH, scale=0.1)
    rule = pc.JumpReLU(torch.full((SIZE,), 1.0))
    return pc.ReplacementModel(language, pc.PerLayerTranscoders(w_enc, b_enc, w_dec, b_dec, rule, w_skip=skip))


def in_float64(thing: Any) -> Any:
    """Return it with every float tensor in float64."""
    if isinstance(thing, Tensor):
        return thing.double() if thing.is_floating_point() else thing
    if isinstance(thing, tuple | list):
        return type(thing)(map(in_float64, thing))
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: in_float64(getattr(thing, f.name)) for f in dataclasses.fields(thing)})
    return thing.to(torch.float64) if isinstance(thing, pc.PerLayerTranscoders) else thing


@dataclass
class Case:
    """A frozen prompt and, in float64, the rows of a graph of it."""

    model: pc.ReplacementModel
    local: LocalReplacement
    row_node: Tensor
    truth: Tensor

    def graph(self, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch) -> pc.Graph:
        monkeypatch.setattr(trace_options, "arithmetic_of", lambda *_: arithmetic)
        return pc.trace.trace_frozen(self.model, self.local, max_targets=2, max_features=ROWS)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model = deep_model(request.param)
    local = model.freeze(builders.prompt(POSITIONS))
    graph = pc.trace.trace_frozen(model, local, max_targets=2, max_features=ROWS)
    row_node = graph.row_node[graph.row_node < graph.first_error]
    layer, position, index = graph.features[row_node].unbind(1)
    vectors = [local.transcoders.w_enc[n][i].double() for n, i in zip(layer, index, strict=True)]
    truth, _ = Sweep(in_float64(local)).rows(layer.tolist(), position.tolist(), torch.stack(vectors))
    yield Case(model, local, row_node, truth)


def row_errors(graph: pc.Graph, case: Case) -> Tensor:
    """Distance of each row from the float64 sweep's, relative to its length."""
    rows = graph.dense().double()[case.row_node, : case.truth.shape[1]]
    return (rows - case.truth).norm(dim=1) / case.truth.norm(dim=1)


def documented() -> dict[str, tuple[float, float]]:
    """Return the two figures of each precision in docs/law.md: error of edges, tolerance of the law."""
    text = (Path(__file__).parents[1] / "docs/law.md").read_text()
    rows = re.findall(r"^\| `\"([\w-]+)\"` \|.*\| (\S+) \| (\S+) \|$", text, re.M)
    return {name: (float(edges), float(tolerance)) for name, edges, tolerance in rows}


def with_emulated_parts(prepared: pc.ops.Prepared, arithmetic: Arithmetic) -> pc.ops.Prepared:
    """Return an op that multiplies sums of as many bfloat16 parts as its kernel would."""
    parts = arithmetic.kernel_parts
    features = prepared.arguments.get("features")
    if parts == 3 or (features is not None and features.count == features.positions):  # one each, in float32
        return prepared

    def rounded(numbers: Tensor) -> Tensor:
        total = torch.zeros_like(numbers)
        for _ in range(parts):
            total += (numbers - total).bfloat16().float()
        return total

    def form(left: Tensor, prefix_ptr: Tensor, *others: Any) -> Any:
        if isinstance(others[0], pc.ops.StoredAttention):
            others = (replace(others[0], pattern=rounded(others[0].pattern)), *others[1:])
        else:
            others = (others[0], rounded(others[1]), *others[2:])
        return prepared.form(rounded(left), prefix_ptr, *others)

    return replace(prepared, form=form)


@pytest.mark.parametrize("name", PRECISIONS)
def test_law_and_edges(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each precision keeps to its own tolerance, and tf32 and bfloat16 miss that of float32."""
    arithmetic, calls = PRECISIONS[name], []
    monkeypatch.setattr("pycircuit.trace.sweep.with_parts", with_emulated_parts)
    split = Products.split
    monkeypatch.setattr(Products, "split", lambda *args: calls.append(args[0].arithmetic) or split(*args))
    graph = case.graph(arithmetic, monkeypatch)
    assert len(calls) > LAYERS and set(calls) == {arithmetic}
    assert graph.provenance["precision"] == name and graph.provenance["tolerance"] == arithmetic.tolerance
    errors = row_errors(graph, case)
    edges, tolerance = documented()[name]
    assert tolerance == arithmetic.tolerance
    assert graph.certificate < tolerance and float(errors.max()) < edges
    if name in LOW:
        assert min(graph.certificate, float(errors.max())) > PRECISIONS["float32"].tolerance


def test_six_products_are_as_good_as_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three are not."""
    plain, six, three = (
        float(row_errors(case.graph(arithmetic, monkeypatch), case).max())
        for arithmetic in (FLOAT32, PRECISIONS["float32"], PRECISIONS["float32-fast"])
    )
    assert six < 3 * plain < three


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("float32", 0, 3e-7), ("float32-fast", 1e-6, 1e-5), ("tf32", 1e-4, 5e-4), ("bfloat16", 1e-3, 4e-3)],
)
def test_products(name: str, low: float, high: float) -> None:
    g = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(33, 700, generator=g), torch.randn(90, 700, generator=g).T
    truth, products = rows.double() @ weight.double(), Products(PRECISIONS[name])

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    assert low <= error(products.project(rows, weight), truth) < high
    out = torch.full((33, 90), torch.nan)
    assert products.project(rows, weight, out) is out and low <= error(out, truth) < high
    state = torch.ones(33, 90)
    products.add(state, rows, weight)
    assert low <= error(state, truth + 1) < high
    assert products.project(rows[:0], weight).shape == (0, 90)
    assert not products.project(torch.full_like(rows, torch.nan), weight).isfinite().any()
    half = weight.half()
    torch.testing.assert_close(products.project(rows, half), products.project(rows, half.float()), rtol=0, atol=0)


def test_tf32_numbers_have_ten_bits_of_mantissa() -> None:
    numbers = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4000)
    rounded = Products(PRECISIONS["tf32"]).split(numbers[:, None])[:, 0]
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert float(((rounded - numbers).abs() / numbers.abs()).max()) <= 2.0**-11


def test_parts_of_weights_are_split_once_and_counted(case: Case) -> None:
    """The plan counts their memory, and the sweep frees them with its buffers."""
    sweep = Sweep(case.local, PRECISIONS["float32"])
    targets = [LAYERS] * 3, [3, 7, 9], case.local.model.unembedding[:3]
    sweep.rows(*targets)
    before = dict(sweep.products._parts)
    sweep.rows(*targets)
    assert len(before) >= 2 * (LAYERS - 1) and all(sweep.products._parts[w] is parts for w, parts in before.items())
    taken = sum(parts.nbytes for parts in before.values())
    size = TraceSize(POSITIONS, 0, 1, 1, LAYERS, False, arithmetic=PRECISIONS["float32"])
    counted = MemoryModel(case.model, size, True).weight_parts()
    assert taken <= counted < 1.2 * taken
    sweep.release()
    assert not sweep.products._parts


def demo() -> pc.ReplacementModel:
    return deep_model("llama")


def traced(model: pc.ReplacementModel, **options: Any) -> pc.Graph:
    return pc.attribute(model, builders.prompt(9), max_features=8, max_targets=1, progress=False, **options)


def test_on_a_cpu(tmp_path: Path) -> None:
    """float32-fast is plain float32 but for an ISA with parts, bfloat16 is not; the precision is recorded and saved."""
    model = demo()
    graphs = {name: traced(model, precision=name) for name in ("float32", "float32-fast", "bfloat16")}
    in_parts = multiplies_bfloat16()
    assert torch.equal(graphs["float32"].dense(), graphs["float32-fast"].dense()) != in_parts
    if in_parts:
        with pc.use("native", isa="baseline"):
            assert torch.equal(traced(model).dense(), traced(model, precision="float32-fast").dense())
    assert torch.equal(graphs["float32"].dense(), traced(model).dense())
    assert 1e-5 < graphs["bfloat16"].certificate < PRECISIONS["bfloat16"].tolerance
    for name, graph in graphs.items():
        graph.save(tmp_path / f"{name}.safetensors")
        saved = pc.Graph.load(tmp_path / f"{name}.safetensors").provenance
        assert (saved["precision"], saved["tolerance"]) == (name, PRECISIONS[name].tolerance)
    many = list(pc.attribute_many(model, [builders.prompt(5)], progress=False, max_features=4, precision="bfloat16"))
    assert many[0].provenance["precision"] == "bfloat16" and many[0].certificate > 1e-5
    needs = [pc.estimate(model, builders.prompt(9), precision=name).plan for name in ("float32", "bfloat16")]
    assert [plan.needs.get("weights", 0) > 0 for plan in needs if plan.phase == "sweep"] == [False, not in_parts]


def test_float64_models_stay_float64() -> None:
    language = builders.build("llama", torch.float64, num_hidden_layers=LAYERS)
    model = pc.ReplacementModel(language, demo().transcoders.to(torch.float64))
    graph = traced(model)
    assert graph.certificate < graph.provenance["tolerance"] == 1e-10 and graph.provenance["precision"] == "float64"
    with pytest.raises(ValueError, match=r"attribute: precision must be left out .* got 'tf32'; load the model with"):
        traced(model, precision="tf32")


@pytest.mark.parametrize(
    ("precision", "kind", "says"),
    [
        ("fp32", ValueError, "must be one of 'float32', 'float32-fast', 'tf32', 'bfloat16', got 'fp32'; 'float32' is"),
        ("tf32", ValueError, "must be 'float32', 'float32-fast' or 'bfloat16' on a CPU, .* got 'tf32'; leave it out"),
        (torch.bfloat16, TypeError, "must be a string, got dtype; leave it out"),
    ],
)
def test_unknown_precisions(precision: Any, kind: type[Exception], says: str) -> None:
    model = demo()
    with pytest.raises(kind, match=f"^attribute: precision {says}"):
        traced(model, precision=precision)
    with pytest.raises(kind, match=f"^estimate: precision {says}"):
        pc.estimate(model, builders.prompt(9), precision=precision)
    with pytest.raises(kind, match=f"^attribute_many: precision {says}"):
        pc.attribute_many(model, [builders.prompt(9)], precision=precision)


def test_a_gpu_needs_a_torch_that_adds_products_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    out, parts = torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"aten::addmm\.dtype_out"):  # of a GPU alone
        torch.addmm(out, parts, parts, beta=0, out_dtype=torch.float32, out=out)
    gpu = torch.device("cuda")
    assert {name: arithmetic_of("attribute", name, gpu, torch.float32) for name in PRECISIONS} == PRECISIONS
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cu130"))
    with pytest.raises(
        RuntimeError, match=r"attribute: torch must be 2\.10 or newer .* got 2\.9\.1\+cu130; upgrade torch"
    ):
        arithmetic_of("attribute", "float32", gpu, torch.float32)


def test_a_checkpoint_under_another_precision_is_refused(tmp_path: Path) -> None:
    model = demo()
    first = traced(model, precision="bfloat16", checkpoint=tmp_path)
    assert torch.equal(first.dense(), traced(model, precision="bfloat16", checkpoint=tmp_path).dense())
    with pytest.raises(pc.CheckpointError, match="differs in precision;"):
        traced(model, checkpoint=tmp_path)


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_matmul_setting_of_the_process_does_not_reach_a_trace(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting is restored afterwards, whichever of several traces ends last."""
    torch.set_float32_matmul_precision(setting)
    seen: list[str] = []
    read = Sweep.read
    monkeypatch.setattr(Sweep, "read", lambda *args: seen.append(torch.get_float32_matmul_precision()) or read(*args))
    traced(demo())
    assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == setting
    first, second = full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"
    with tf32_products():
        assert torch.get_float32_matmul_precision() == "high"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PRECISIONS)
def test_on_a_gpu(name: str) -> None:
    """Tensor cores keep to the same tolerances as the emulation."""
    language = builders.build("gemma2", num_hidden_layers=LAYERS, **_WINDOWS).cuda()
    model = pc.ReplacementModel(language, deep_model("gemma2").transcoders.to("cuda"))
    graph = pc.attribute(model, builders.prompt(POSITIONS), precision=name, max_features=ROWS, progress=False)
    assert graph.provenance["precision"] == name and graph.certificate < PRECISIONS[name].tolerance
    assert (graph.certificate > PRECISIONS["float32"].tolerance) == (name in LOW)
