"""Transcoders in memory and the replacement: active features, reconstruction, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import LAYERS, VOCABULARY, WIDTH, build, prompt

import pycircuit as pc
from pycircuit.model.agreement import relative_error
from pycircuit.model.capture import STREAMS, capture
from pycircuit.model.families import family_of
from pycircuit.model.weights import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 24
RULES = {
    "relu": pc.ReLU(),
    "jumprelu": pc.JumpReLU(torch.linspace(0.2, 1.5, SIZE)),
    "topk": pc.TopK(4),
    "topk_negative": pc.TopK(4, keep_negative=True),
    "batchtopk": pc.BatchTopK(0.9),
}
READS, WRITES = ("resid_mid", "mlp_normed", "mlp_in"), ("mlp_out", "mlp_raw")
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
EVERY_KIND = pytest.mark.parametrize("kind", ["plt", "clt"])


def weights(kind: str, dtype: torch.dtype = torch.float32, missing: tuple[int, ...] = (), skip: bool = False) -> Any:
    """Constructor arguments with sizes that differ between layers."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    arguments: dict[str, list[Any]] = {"w_enc": [], "b_enc": [], "w_dec": [], "b_dec": []}
    for layer in range(LAYERS):
        slots = () if kind == "plt" else (LAYERS - layer,)
        for name, shape in (("w_enc", (SIZE, WIDTH)), ("b_enc", (SIZE,)), ("w_dec", (SIZE, *slots, WIDTH))):
            arguments[name].append(None if layer in missing else normal(*shape))
        arguments["b_dec"].append(normal(WIDTH))
    if skip:
        arguments["w_skip"] = [normal(WIDTH, WIDTH) for _ in range(LAYERS)]
    return arguments


def make(kind: str, **options: Any) -> pc.PerLayerTranscoders | pc.CrossLayerTranscoder:
    arguments = weights(kind, **{k: options.pop(k) for k in ("dtype", "missing", "skip") if k in options})
    return (pc.PerLayerTranscoders if kind == "plt" else pc.CrossLayerTranscoder)(**{**arguments, **options})


def streams(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    row = family_of(model)
    return capture(model, row, read_weights(model, row), ids, STREAMS).streams


def dense_reconstruction(t: Any, x: torch.Tensor, ignore: int) -> torch.Tensor:
    """The definition, written down without a single op: [layers, positions, width]."""
    out = torch.zeros_like(x)
    for source in range(LAYERS):
        if t.w_enc[source] is not None:
            pre = x[source] @ t.w_enc[source].T + t.b_enc[source]
            value = torch.where(t.activation[source].active(pre), pre, 0)
            value[:ignore] = 0
            for target in range(LAYERS):
                if isinstance(t, pc.PerLayerTranscoders) and target == source:
                    out[target] += value @ t.w_dec[source]
                elif isinstance(t, pc.CrossLayerTranscoder) and target >= source:
                    out[target] += value @ t.w_dec[source][:, target - source]
    for layer in range(LAYERS):
        if t.writes_to(layer):
            out[layer, ignore:] += t.b_dec[layer]
        if t.w_skip[layer] is not None:
            out[layer] += x[layer] @ t.w_skip[layer]
    return out


@EVERY_KIND
@EVERY_RULE
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_errors_complete_the_mlp(kind: str, rule: str, skip: bool, dtype: torch.dtype, tolerance: float) -> None:
    assert_complete(
        build("llama", dtype), make(kind, dtype=dtype, skip=skip, activation=in_dtype(rule, dtype)), tolerance
    )


@EVERY_KIND
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("reads", READS)
def test_every_read_and_write(kind: str, family: str, reads: str, writes: str) -> None:
    options = {"dtype": torch.float64, "skip": True, "activation": in_dtype("jumprelu", torch.float64)}
    assert_complete(build(family, torch.float64), make(kind, reads=reads, writes=writes, **options), 1e-12)


def in_dtype(rule: str, dtype: torch.dtype) -> Any:
    activation = RULES[rule]
    return pc.JumpReLU(activation.theta.to(dtype)) if isinstance(activation, pc.JumpReLU) else activation


def assert_complete(model: Any, transcoders: Any, tolerance: float) -> None:
    """Reconstruction and errors add up to what the MLP gave."""
    local = pc.ReplacementModel(model, transcoders).freeze(prompt())
    s = streams(model, prompt())
    x, written = s[transcoders.reads], s[transcoders.writes]
    assert relative_error(dense_reconstruction(transcoders, x, 1) + local.errors, written) < tolerance
    assert relative_error(transcoders.reconstruct(local.features, x, ignore=1), written - local.errors) < tolerance
    assert all(f.count and f.row_ptr[1] == 0 for f in local.features)


@EVERY_KIND
def test_layers_without_a_transcoder(kind: str) -> None:
    model = build("llama", torch.float64)
    transcoders = make(kind, dtype=torch.float64, missing=(0,), reads="mlp_in")
    local = pc.ReplacementModel(model, transcoders).freeze(prompt())
    s = streams(model, prompt())
    assert local.features[0].count == 0 and local.features[0].positions == len(prompt())
    assert torch.equal(local.errors[0], s["mlp_out"][0])  # its b_dec belongs to no feature
    assert transcoders.bias(0) is None and transcoders.bias(1) is not None
    assert relative_error(dense_reconstruction(transcoders, s["mlp_in"], 1) + local.errors, s["mlp_out"]) < 1e-12
    last = make(kind, dtype=torch.float64, missing=(2,))
    assert last.writes_to(2) == (kind == "clt")  # lower features still write there


@EVERY_KIND
@pytest.mark.parametrize("ignore", [0, 1, 4, 99])
def test_ignored_positions_are_all_error(kind: str, ignore: int) -> None:
    model = build("gemma2", torch.float64)
    transcoders = make(kind, dtype=torch.float64, reads="mlp_in")
    local = pc.ReplacementModel(model, transcoders, ignore_positions=ignore).freeze(prompt())
    s = streams(model, prompt())
    assert torch.equal(local.errors[:, :ignore], s["mlp_out"][:, :ignore])
    assert all(int(f.row_ptr[min(ignore, len(prompt()))]) == 0 for f in local.features)
    assert relative_error(dense_reconstruction(transcoders, s["mlp_in"], ignore) + local.errors, s["mlp_out"]) < 1e-12


def test_gemma3_chat_ignores_four() -> None:
    model = build("gemma3_text")
    assert pc.ReplacementModel(model, make("plt")).ignore_positions == 1
    model.config._name_or_path = "somewhere/gemma-3-1b-it"
    assert pc.ReplacementModel(model, make("plt")).ignore_positions == 4
    assert pc.ReplacementModel(model, make("plt"), ignore_positions=2).ignore_positions == 2


def test_decoders_are_views() -> None:
    clt = make("clt")
    view = clt.decoder(1, 2)
    assert view.data_ptr() == clt.w_dec[1][0, 1].data_ptr() and view.shape == (SIZE, WIDTH)
    assert list(clt.sources(2)) == [0, 1, 2] and list(make("plt").sources(2)) == [2]
    with pytest.raises(ValueError, match="got 2 -> 1"):
        clt.decoder(2, 1)
    with pytest.raises(ValueError, match="got 0 -> 1"):
        make("plt").decoder(0, 1)


def test_one_threshold_tensor_for_each_layer() -> None:
    theta = torch.rand(LAYERS, SIZE)
    for thresholds in (theta, list(theta)):
        rules = make("plt", activation=pc.JumpReLU(thresholds)).activation
        assert all(torch.equal(rule.theta, theta[layer]) for layer, rule in enumerate(rules))
    mixed = [pc.ReLU(), pc.TopK(3), pc.BatchTopK(0.1)]
    assert make("clt", activation=mixed).activation == mixed


@EVERY_KIND
def test_to_converts_everything(kind: str) -> None:
    double = make(kind, skip=True, activation=pc.JumpReLU(torch.ones(SIZE))).to(torch.float64)
    assert type(double) is type(make(kind)) and double.activation[0].theta.dtype == torch.float64
    tensors = [t for name in ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip") for t in getattr(double, name)]
    assert {t.dtype for t in tensors} == {torch.float64}
    assert pc.ReplacementModel(build("llama", torch.float64), double).dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("plt", {"reads": "resid_post"}, ValueError, "reads must be one of resid_mid, mlp_normed, mlp_in"),
        ("clt", {"writes": "resid"}, ValueError, "writes must be one of mlp_out, mlp_raw"),
        ("plt", {"b_enc": [torch.zeros(SIZE)] * 2}, ValueError, "b_enc must have one entry for each of the 3 layers"),
        ("plt", {"b_enc": [torch.zeros(5)] * 3}, ValueError, r"layer 0: b_enc must have shape \[24\].*got \[5\]"),
        ("plt", {"w_dec": [torch.zeros(9, WIDTH)] * 3}, ValueError, r"layer 0: w_dec .* \[24, any\].*got \[9, 32\]"),
        ("clt", {"w_dec": [torch.zeros(SIZE, 3, WIDTH)] * 3}, ValueError,
         r"layer 1: w_dec .* \[24, 2, any\].*got \[24, 3, 32\]"),
        ("plt", {"w_dec": [None] * 3}, TypeError, "layer 0: w_dec must be a torch tensor, got NoneType"),
        ("plt", {"w_enc": [None] * 3}, ValueError, "layer 0: w_enc must be given"),
        ("plt", {"activation": torch.relu}, TypeError, "layer 0: activation must be pc.ReLU"),
        ("plt", {"activation": [pc.ReLU()]}, ValueError, "activation must have one entry"),
    ],
)  # fmt: skip
def test_constructors_name_the_layer(kind: str, changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **changes)


def test_shapes_are_checked_against_the_model() -> None:
    model, g = build("llama"), torch.Generator().manual_seed(0)

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            pc.ReplacementModel(model, make("plt", **changes))

    wide = [torch.randn(SIZE, WIDTH, generator=g)] * 2 + [torch.randn(SIZE, 40, generator=g)]
    refused(ValueError, r"layer 2: w_enc must have shape \[24, 32\].*got \[24, 40\]", w_enc=wide)
    refused(ValueError, r"layer 2: w_dec must have shape \[24, 32\].*got \[24, 40\]", w_dec=wide)
    refused(ValueError, r"layer 0: b_dec must have shape \[32\].*got \[7\]", b_dec=[torch.zeros(7)] * 3)
    refused(ValueError, r"layer 0: w_skip must have shape \[32, 32\]", w_skip=[torch.zeros(WIDTH, 3)] * 3)
    refused(TypeError, "layer 0: w_enc must be float64 exactly if", dtype=torch.float64)
    two = {name: entries[:2] for name, entries in weights("plt").items()}
    with pytest.raises(ValueError, match="one entry for each of the model's 3 layers, got 2"):
        pc.ReplacementModel(model, pc.PerLayerTranscoders(**two))
    with pytest.raises(TypeError, match=r"pc\.PerLayerTranscoders or pc\.CrossLayerTranscoder, got list"):
        pc.ReplacementModel(model, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a transformers causal model, got Linear"):
        pc.ReplacementModel(torch.nn.Linear(2, 2), make("plt"))


class Letters:
    """A stand-in tokenizer: one id a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]


def test_prompts_are_checked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pc.ReplacementModel(build("llama"), make("plt"), Letters())
    assert model.tokens("abc").tolist() == Letters().encode("abc")
    assert torch.equal(model.tokens(prompt()[None]), prompt())
    assert torch.equal(model.tokens(prompt().numpy()), prompt())
    monkeypatch.setattr(model.hf_model, "forward", None)
    monkeypatch.setattr(model.hf_model.model, "forward", None)
    bad: list[tuple[Any, type[Exception], str]] = [
        ("", ValueError, "at least one token, got none"),
        ([], ValueError, "at least one token, got none"),
        ([1] * 65, ValueError, "at most the model's 64 positions, got 65"),
        ([3, VOCABULARY], ValueError, "ids from 0 to 60, got 61 at position 1"),
        ([-1], ValueError, "got -1 at position 0"),
        ([1.5], TypeError, "text or a list of token ids"),
        (None, TypeError, "text or a list of token ids, got NoneType"),
    ]
    for wrong, error, message in bad:
        with pytest.raises(error, match=message):
            model.freeze(wrong)
        with pytest.raises(error, match=message):
            model.activations([[1, 2], wrong])
    with pytest.raises(TypeError, match=r"^activations: prompts must be a prompt or a list of prompts, got int$"):
        model.activations(3)
    silent = pc.ReplacementModel(build("llama"), make("plt"))
    with pytest.raises(ValueError, match="the model has no tokenizer, got text; pass tokenizer="):
        silent.freeze("abc")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt_neox"])
def test_activations_are_those_of_freeze(
    family: str, reads: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    transcoders = make("plt", dtype=wide, reads=reads, missing=(1,))
    model = pc.ReplacementModel(build(family, dtype), transcoders, ignore_positions=2)
    monkeypatch.setattr("pycircuit.model.replacement._BATCH_POSITIONS", 60)
    prompts = [prompt(n, seed=n) for n in (13, 1, 7, 64, 5, 7, 12)]
    assert model._batches([13, 1, 7, 64]) == ([[3], [0, 2, 1]] if dtype == torch.float32 else [[3], [0], [2], [1]])
    activations = model.activations(prompts)
    assert len(activations) == len(prompts) and model.activations([]) == []
    for ids, layers in zip(prompts, activations, strict=True):
        expected = model.freeze(ids).features
        for got, want in zip(layers, expected, strict=True):
            assert torch.equal(got.row_ptr, want.row_ptr) and torch.equal(got.index, want.index)
            torch.testing.assert_close(got.value, want.value, rtol=1e-4, atol=1e-5)


@EVERY_KIND
def test_half_precision_models(kind: str) -> None:
    model = build("llama", torch.bfloat16)
    transcoders = make(kind, skip=True, reads="mlp_in").to(torch.bfloat16)
    local = pc.ReplacementModel(model, transcoders).freeze(prompt())
    assert local.errors.dtype == torch.float32 and all(f.value.dtype == torch.float32 for f in local.features)
    s = streams(model, prompt())
    got = dense_reconstruction(transcoders.to(torch.float32), s["mlp_in"], 1) + local.errors
    assert relative_error(got, s["mlp_out"]) < 1e-5


def test_stored_or_recomputed_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pc.ReplacementModel(build("llama"), make("plt"))
    assert isinstance(model.freeze(prompt()).model.layers[0].attention, pc.ops.StoredAttention)
    monkeypatch.setattr("pycircuit.model.replacement.PATTERN_BYTES", 100)
    assert isinstance(model.freeze(prompt()).model.layers[0].attention, pc.ops.RecomputedAttention)
    assert isinstance(model.freeze(prompt(), stored=True).model.layers[0].attention, pc.ops.StoredAttention)


def back(norm: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Gradient through a norm, and what the norm's own bias adds."""
    if norm is None:
        return gradient, 0.0
    return norm.back(gradient), 0.0 if norm.bias is None else float((gradient @ norm.bias).sum())


def back_attention(layer: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A gradient on what attention adds, down to the layer's input, and what biases add."""
    gradient, bias = back(layer.post_attention_norm, gradient)
    if layer.b_o is not None:
        bias += float((gradient @ layer.b_o).sum())
    y = (gradient @ layer.w_o).unflatten(1, (layer.heads, layer.head_width)).contiguous()
    z = pc.ops.attend_back(y, torch.tensor([0, len(y)]), layer.attention).flatten(1)
    if layer.b_v is not None:
        bias += float((z @ layer.b_v).sum())
    gradient, norm_bias = back(layer.attention_norm, z @ layer.w_v)
    return gradient, bias + norm_bias


def back_mlp(local: Any, layer: int, gradient: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """A gradient on what the MLP adds: what the skip passes on to where it reads, edges, biases."""
    t, frozen = local.transcoders, local.model.layers[layer]
    written, bias = back(frozen.write_norm(t.writes), gradient)
    edges = float((written * local.errors[layer]).sum())
    for source in t.sources(layer):
        features = local.features[source]
        rows = t.decoder(source, layer)[features.index]
        edges += float((written[features.position()] * rows * features.value[:, None]).sum())
    if t.bias(layer) is not None:
        bias += float((written[local.ignore_positions :] @ t.bias(layer)).sum())
    if t.w_skip[layer] is None:
        return torch.zeros_like(gradient), edges, bias
    through, norm_bias = back(frozen.read_norm(t.reads), written @ t.w_skip[layer].T)
    return through, edges, bias + norm_bias


def walk(local: Any, gradient: torch.Tensor, top: int) -> float:
    """Every edge and bias below a gradient [positions, width] on the stream before the MLP norm of layer `top`."""
    model, total = local.model, 0.0
    for layer in reversed(range(top + 1)):
        frozen, through = model.layers[layer], torch.zeros_like(gradient)
        if layer < top:
            through, edges, bias = back_mlp(local, layer, gradient)
            total += edges + bias
        if frozen.parallel:  # the MLP reads beside attention, not after it
            attended, bias = back_attention(frozen, gradient) if layer < top else (0.0, 0.0)
            gradient = gradient + attended + through
        else:
            gradient = gradient + through
            attended, bias = back_attention(frozen, gradient)
            gradient = gradient + attended
        total += bias
    return total + float((gradient * model.first_stream()).sum())


@EVERY_KIND
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "olmo2", "phi3", "gpt_oss"])
def test_the_law_on_one_target(kind: str, skip: bool, reads: str, family: str) -> None:
    """Edges and biases into a feature add up to its value: everything a sweep needs is in what freeze gives."""
    writes = WRITES[skip]
    options = {"dtype": torch.float64, "skip": skip, "activation": pc.TopK(4, keep_negative=True)}
    transcoders = make(kind, reads=reads, writes=writes, **options)
    for stored in (True, False):
        local = pc.ReplacementModel(build(family, torch.float64), transcoders).freeze(prompt(), stored=stored)
        top = LAYERS - 1
        features = local.features[top]
        position, index, value = int(features.position()[-2]), int(features.index[-2]), float(features.value[-2])
        gradient = torch.zeros(local.model.positions, WIDTH, dtype=torch.float64)
        gradient[position] = transcoders.w_enc[top][index]
        gradient, bias = back(local.model.layers[top].read_norm(reads), gradient)
        expected = value - float(transcoders.b_enc[top][index])
        assert abs(walk(local, gradient, top) + bias - expected) < 1e-10 * max(1.0, abs(expected))


@EVERY_KIND
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2"])
def test_the_law_on_a_logit(kind: str, family: str) -> None:
    local = pc.ReplacementModel(build(family, torch.float64), make(kind, dtype=torch.float64)).freeze(prompt())
    model, top = local.model, LAYERS - 1
    gradient = torch.zeros(model.positions, WIDTH, dtype=torch.float64)
    gradient[-1] = model.unembedding[5] - model.unembedding_mean
    logits = model.unembed(model.final_norm.forward(model.final_stream)[-1:])[0]
    gradient, bias = back(model.final_norm, gradient)
    through, edges, mlp_bias = back_mlp(local, top, gradient)
    assert not through.any()
    if model.layers[top].parallel:
        attended, attention_bias = back_attention(model.layers[top], gradient)
        total = walk(local, gradient + attended, top) + attention_bias
    else:
        total = walk(local, gradient, top)
    expected = float(logits[5] - logits.mean())
    assert abs(total + edges + mlp_bias + bias - expected) < 1e-10 * max(1.0, abs(expected))
