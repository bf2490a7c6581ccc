"""One forward of a transformers model, on one copy and without a tape, that leaves everything frozen behind.

Attention goes through transformers' attention interface, which hands over query and key after rotary
embedding and norms: no family needs code of its own. The rest is read by hooks on the modules a row names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pycircuit.ops import Attention, RecomputedAttention, StoredAttention

from .families import Family, FamilyError
from .freed_memory import trim
from .frozen import FrozenLayer, FrozenModel, FrozenNorm, attention_block
from .hooks import Hooks, attending, attention_by, require_calls, stream_into, stream_out
from .weights import NORMS, LayerWeights, ModelWeights, Norm, module

STREAMS = ("resid_in", "attention_out", "resid_mid", "mlp_normed", "mlp_in", "mlp_raw", "mlp_out")

_RUNNING: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def running(model: nn.Module) -> Any:
    """The lock of a model, held while we run it: one of our forwards at a time, through whatever object."""
    return _RUNNING.setdefault(model, RLock())


@dataclass(eq=False)
class Captured:
    """A frozen model and the streams asked for, each [layers, positions, width]."""

    model: FrozenModel
    streams: dict[str, Tensor]


@dataclass(eq=False)
class _Recorder:
    """What one forward leaves behind, filled in by the hooks and by attention."""

    weights: ModelWeights
    positions: int
    stored: bool
    streams: dict[str, Tensor]
    layer_of: dict[int, int]
    exact_norms: bool = True
    lean: bool = False
    attention: dict[int, Attention] = field(default_factory=dict)
    norms: dict[tuple[int, str], FrozenNorm] = field(default_factory=dict)
    windows: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    written: set[tuple[str, int]] = field(default_factory=set)
    position_part: Tensor | None = None
    first_stream: Tensor | None = None
    final_stream: Tensor | None = None

    def write(self, name: str, layer: int, value: Tensor) -> None:
        if name in self.streams:
            self.streams[name][layer] = value[0]
            self.written.add((name, layer))

    def attend(self, owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
        layer, wide = layer_at(self.layer_of, owner), self.weights.dtype
        draft = described(owner, layer, query, key, how, self.window(how["attention_mask"]), wide)
        size = draft.positions
        pattern = query.new_zeros(draft.heads, size, size, dtype=wide) if self.stored else None
        out = attend(draft, value[0].to(wide), pattern)
        self.attention[layer] = draft if pattern is None else StoredAttention(pattern, draft.groups)
        return out.transpose(0, 1)[None].to(query.dtype)

    def window(self, mask: Tensor) -> int:
        """The window a mask stands for; 0 if every query sees all before it."""
        if id(mask) not in self.windows:  # layers of a kind share one mask
            self.windows[id(mask)] = (mask, window_of(mask[0, 0]))
        return self.windows[id(mask)][1]


def window_of(mask: Tensor) -> int:
    """mask: [positions, positions] bool -> its sliding window, or an error if it is not causal."""
    positions = mask.shape[0]
    seen = int(mask[-1].sum())
    window = 0 if seen == positions else seen
    expected = torch.ones_like(mask).tril()
    if window:
        expected = expected.triu(1 - window)
    if not torch.equal(mask, expected):
        raise FamilyError(
            "capture: attention must be causal, with or without a sliding window, got a mask that is neither; "
            "models with chunked or bidirectional attention cannot be traced"
        )
    return window


def layer_at(layer_of: dict[int, int], owner: nn.Module) -> int:
    if id(owner) not in layer_of:
        raise RuntimeError(f"capture: attention must be in a layer that the row names, got {type(owner).__name__}")
    return layer_of[id(owner)]


def described(
    owner: nn.Module, layer: int, query: Tensor, key: Tensor, how: dict[str, Any], window: int, wide: torch.dtype
) -> RecomputedAttention:
    """Attention as transformers asks for it, its log_sum_exp still empty; the heads of all prompts one after another.

    query: [prompts, heads, positions, width]; key: [prompts, kv_heads, positions, width].
    """
    sinks = how.get("s_aux")
    return RecomputedAttention(
        query=query.flatten(0, 1).to(wide).contiguous(),
        key=key.flatten(0, 1).to(wide).contiguous(),
        log_sum_exp=query.new_empty(query.shape[0] * query.shape[1], query.shape[2], dtype=wide),
        scale=_scale(owner, how.get("scaling"), query.shape[-1], layer),
        softcap=float(how.get("softcap") or 0.0),
        window=window,
        sinks=None if sinks is None else sinks.detach().to(wide).repeat(query.shape[0]),
    )


def _scale(owner: nn.Module, scaling: float | None, width: int, layer: int) -> float:
    """The factor on logits. GPT-2 before transformers 5 passes none and keeps two flags on the module instead."""
    if scaling is not None:
        return float(scaling)
    scale = width**-0.5 if getattr(owner, "scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if getattr(owner, "scale_attn_by_inverse_layer_idx", False) else scale


def attend(attention: RecomputedAttention, value: Tensor, pattern: Tensor | None) -> Tensor:
    """Causal attention in blocks of queries; fills in log_sum_exp, and the pattern where one is given.

    value: [kv_heads, positions, width] -> [heads, positions, width]; pattern: [heads, positions, positions].
    """
    heads, positions, _ = attention.query.shape
    out = value.new_empty(heads, positions, value.shape[2])
    step = max(1, attention_block(value.device) // max(1, heads * positions))
    for begin in range(0, positions, step):
        end = min(begin + step, positions)
        first = max(0, begin + 1 - attention.window) if attention.window else 0
        logits = _logits(attention, begin, end, first)
        rows = logits.softmax(-1)
        # The largest weight of a row is at least one over its length, so its logarithm is exact enough.
        attention.log_sum_exp[:, begin:end] = logits.amax(-1) - rows.amax(-1).log()
        if attention.sinks is not None:
            kept = attention.log_sum_exp[:, begin:end] - attention.normaliser()[:, begin:end]
            rows *= kept.exp()[..., None]
        grouped = rows.unflatten(0, (attention.groups, -1))
        out[:, begin:end] = (grouped @ value[:, None, first:end]).flatten(0, 1)
        if pattern is not None:
            pattern[:, begin:end, first:end] = rows
    return out


def _logits(attention: RecomputedAttention, begin: int, end: int, first: int) -> Tensor:
    """Masked logits of queries begin .. end over keys first .. end: [heads, end - begin, end - first]."""
    query = attention.query[:, begin:end].unflatten(0, (attention.groups, -1))
    key = attention.key[:, None, first:end].transpose(-1, -2)
    logits = ((query * attention.scale) @ key).flatten(0, 1)
    if attention.softcap:
        logits = logits.div_(attention.softcap).tanh_().mul_(attention.softcap)
    seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).tril(begin - first)
    if attention.window:
        seen = seen.triu(begin - first + 1 - attention.window)
    return logits.masked_fill_(~seen, -torch.inf)


def _before(hooks: Hooks, owner: nn.Module, act: Callable[[Tensor], None]) -> None:
    hooks.before(owner, lambda args, kwargs: act(stream_into(args, kwargs)))


def _after(hooks: Hooks, owner: nn.Module, act: Callable[[Tensor], None]) -> None:
    hooks.after(owner, lambda args, kwargs, out: act(stream_out(out)))


@dataclass(frozen=True, eq=False)
class _Taps:
    """What hooks on the modules of a row write into a recorder."""

    row: Family
    recorder: _Recorder

    def put(self, hooks: Hooks, model: nn.Module) -> None:
        row, recorder = self.row, self.recorder
        layers = list(module(model, row.layers, row).children())
        for i, (layer, weights) in enumerate(zip(layers, recorder.weights.layers, strict=True)):
            self._layer(hooks, i, layer, weights)
        if row.position_embedding is not None:
            _after(hooks, module(model, row.position_embedding, row), self._positions)
        self._norm(hooks, -1, module(model, row.final_norm, row), "final_norm", recorder.weights.final_norm)

    def _layer(self, hooks: Hooks, index: int, layer: nn.Module, weights: LayerWeights) -> None:
        row, write = self.row, self.recorder.write
        self.recorder.layer_of.update((id(m), index) for m in layer.modules())
        _before(hooks, layer, lambda x: self._enter(index, x))
        for name in NORMS:
            path, norm = getattr(row, name), getattr(weights, name)
            if path is not None:
                self._norm(hooks, index, module(layer, path, row), name, norm)
        mlp = module(layer, row.mlp, row)
        last = module(layer, row.post_attention_norm or row.output, row)
        _after(hooks, last, lambda out: write("attention_out", index, out))
        _before(hooks, module(layer, row.mlp_norm or row.mlp, row), lambda x: write("resid_mid", index, x))
        _before(hooks, mlp, lambda x: write("mlp_in", index, x))
        if self.recorder.lean:
            for owner in (layer, mlp):
                _before(hooks, owner, lambda _: trim())
        _after(hooks, mlp, lambda out: write("mlp_raw", index, out))
        _after(hooks, module(layer, row.post_mlp_norm or row.mlp, row), lambda out: write("mlp_out", index, out))

    def _enter(self, index: int, x: Tensor) -> None:
        self.recorder.write("resid_in", index, x)
        if index == 0:
            self.recorder.first_stream = x[0].to(self.recorder.weights.dtype)

    def _positions(self, out: Tensor) -> None:
        self.recorder.position_part = out.reshape(-1, out.shape[-1]).to(self.recorder.weights.dtype)

    def _norm(self, hooks: Hooks, index: int, owner: nn.Module, name: str, norm: Norm) -> None:
        """Denominators from the norm's own input. In float64 an exact output takes the place of transformers' own."""

        def act(args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> Tensor | None:
            x = stream_into(args, kwargs)
            frozen = self.recorder.norms[index, name] = norm.freeze(x[0])
            if index < 0:
                self.recorder.final_stream = x[0].to(self.recorder.weights.dtype)
            if name == "mlp_norm" and "mlp_normed" in self.recorder.streams:
                bare = FrozenNorm(frozen.sigma, None, None, frozen.center)
                self.recorder.write("mlp_normed", index, bare.forward(x[0].to(frozen.sigma.dtype))[None])
            exact = self.recorder.exact_norms and x.dtype == torch.float64
            return frozen.forward(x[0])[None] if exact else None

        hooks.after(owner, act)


def capture(
    model: Any,
    row: Family,
    weights: ModelWeights,
    ids: Tensor,
    record: Sequence[str] = (),
    stored: bool = True,
    settle: bool = True,
    exact_norms: bool = True,
    lean: bool = False,
) -> Captured:
    """Run the prompt once and freeze it. ids: [positions]; record: which of STREAMS to keep.

    stored: keep attention patterns, otherwise query, key and log-sum-exp. settle: from a model in half
    precision take patterns and MLP outputs, and add up the streams between again in float32 (see `_settled`).
    exact_norms: in a float64 model compute norms' outputs in float64, where transformers goes through float32.
    lean: give back what each layer freed, so that the next one's tensors need not lie beside its holes.
    """
    if model.training:
        raise ValueError("capture: model must be in evaluation mode, got one in training; call model.hf_model.eval()")
    half = settle and weights.stored != weights.dtype
    wanted = {"mlp_raw"} if half else {_recorded(name, row) for name in record}
    shape = (len(weights.layers), len(ids), weights.width)
    streams = {name: torch.empty(shape, dtype=weights.dtype, device=weights.device) for name in wanted}
    recorder = _Recorder(weights, len(ids), stored, streams, {}, exact_norms, lean)
    with running(model), Hooks() as hooks:
        _Taps(row, recorder).put(hooks, model)
        with torch.no_grad(), attending(model, recorder.attend):
            model.base_model(input_ids=ids[None], use_cache=False)
    _complete(recorder, row)
    frozen = _assembled(recorder, ids)
    if half:
        frozen, streams = _settled(frozen, weights, streams["mlp_raw"], record)
        return Captured(frozen, streams)
    return Captured(frozen, {name: streams[_recorded(name, row)] for name in record})


def _recorded(name: str, row: Family) -> str:
    """The stream that holds `name`: without a norm before the MLP, what it reads is all one."""
    return "mlp_in" if name == "mlp_normed" and row.mlp_norm is None else name


def read_batch(model: Any, row: Family, weights: ModelWeights, ids: Tensor, reads: str) -> Tensor:
    """What transcoders read, nothing frozen: ids [prompts, positions] -> [layers, prompts, positions, width].

    Prompts may be padded on the right: what comes later changes nothing in a causal model.
    """
    out = torch.empty(len(weights.layers), *ids.shape, weights.width, dtype=weights.dtype, device=weights.device)
    with running(model):
        _read_into(out, model, row, weights, ids, reads)
    return out


def _read_into(out: Tensor, model: Any, row: Family, weights: ModelWeights, ids: Tensor, reads: str) -> None:
    seen = set()
    with Hooks() as hooks:
        layers = module(model, row.layers, row).children()
        for index, (layer, layer_weights) in enumerate(zip(layers, weights.layers, strict=True)):
            owner = row.mlp if reads == "mlp_in" or row.mlp_norm is None else row.mlp_norm
            norm = layer_weights.mlp_norm if reads == "mlp_normed" else None

            def act(args: Any, kwargs: Any, index: int = index, norm: Norm | None = norm) -> None:
                x = stream_into(args, kwargs)
                if norm is not None:
                    flat = x.flatten(0, 1).to(weights.dtype)
                    x = replace(norm.freeze(flat), gain=None, bias=None).forward(flat).view_as(x)
                out[index] = x
                seen.add(index)

            hooks.before(module(layer, owner, row), act)
        with torch.no_grad(), attention_by(model, "eager"):
            model.base_model(input_ids=ids, use_cache=False)
    require_calls(row, {reads: range(len(weights.layers))}, {(reads, index) for index in seen})


def _complete(recorder: _Recorder, row: Family) -> None:
    """Nothing of what a frozen model is made of may be missing, nor a stream hold what was in memory before."""
    depth = range(len(recorder.weights.layers))
    wanted = {"attention": depth, "resid_in": range(1), "final_norm": range(-1, 0)}
    wanted |= dict.fromkeys(recorder.streams, depth)
    wanted |= {name: depth for name in NORMS if getattr(row, name) is not None}
    written = {("attention", index) for index in recorder.attention} | recorder.written
    written |= {(name, index) for index, name in recorder.norms}
    if recorder.first_stream is not None:
        written.add(("resid_in", 0))
    if row.position_embedding is not None:
        wanted["position_embedding"] = range(1)
    if recorder.position_part is not None:
        written.add(("position_embedding", 0))
    require_calls(row, wanted, written)


def _assembled(recorder: _Recorder, ids: Tensor) -> FrozenModel:
    weights, norms = recorder.weights, recorder.norms
    first, final = recorder.first_stream, recorder.final_stream
    assert first is not None and final is not None  # _complete has looked
    layers = tuple(
        FrozenLayer(
            attention_norm=norms.get((at, "attention_norm")),
            w_v=w.w_v,
            b_v=w.b_v,
            w_o=w.w_o,
            b_o=w.b_o,
            back_v=w.back_v,
            back_o=w.back_o,
            attention=recorder.attention[at],
            post_attention_norm=norms.get((at, "post_attention_norm")),
            mlp_norm=norms.get((at, "mlp_norm")),
            post_mlp_norm=norms.get((at, "post_mlp_norm")),
            parallel=weights.parallel,
            heads=w.heads,
            kv_heads=w.kv_heads,
        )
        for at, w in enumerate(weights.layers)
    )
    part = recorder.position_part
    return FrozenModel(
        tokens=ids,
        embeddings=first if part is None else first - part,
        position_part=part,
        layers=layers,
        final_stream=final,
        final_norm=norms[-1, "final_norm"],
        unembedding=weights.unembedding,
        unembedding_bias=weights.unembedding_bias,
        unembedding_mean=weights.unembedding_mean,
        final_softcap=weights.final_softcap,
    )


def _refrozen(norm: Norm | None, x: Tensor) -> FrozenNorm | None:
    return None if norm is None else norm.freeze(x)


def _settled(
    frozen: FrozenModel, weights: ModelWeights, mlp_raw: Tensor, record: Sequence[str]
) -> tuple[FrozenModel, dict[str, Tensor]]:
    """The half-precision run, added up again in float32 from its embeddings, patterns and MLP outputs.

    Half precision rounds the stream at every layer, so its parts do not add up to it: edges would miss the
    law by the rounding of a whole stream. These streams do add up; norms are frozen on them.
    """
    streams = {name: torch.empty_like(mlp_raw) for name in record if name != "mlp_raw"}
    stream, layers = frozen.first_stream(), []
    for at, (layer, w) in enumerate(zip(frozen.layers, weights.layers, strict=True)):
        layer = replace(layer, attention_norm=_refrozen(w.attention_norm, stream))
        raw = layer.attention_raw(stream)
        layer = replace(layer, post_attention_norm=_refrozen(w.post_attention_norm, raw))
        attended = raw if layer.post_attention_norm is None else layer.post_attention_norm.forward(raw)
        middle = stream if layer.parallel else stream + attended
        layer = replace(layer, mlp_norm=_refrozen(w.mlp_norm, middle))
        layer = replace(layer, post_mlp_norm=_refrozen(w.post_mlp_norm, mlp_raw[at]))
        added = layer.mlp_added(mlp_raw[at])
        found = {"resid_in": stream, "attention_out": attended, "resid_mid": middle, "mlp_out": added}
        for name in ("mlp_normed", "mlp_in"):
            norm = layer.read_norm(name)
            found[name] = middle if norm is None else norm.forward(middle)
        for name, out in streams.items():
            out[at] = found[name]
        stream = stream + attended + added
        layers.append(layer)
    if "mlp_raw" in record:
        streams["mlp_raw"] = mlp_raw
    final_norm = weights.final_norm.freeze(stream)
    return replace(frozen, layers=tuple(layers), final_stream=stream, final_norm=final_norm), streams


def disagreement(captured: Captured) -> dict[str, float]:
    """How far the frozen model is from what ran, part by part: the largest relative error over layers.

    captured must hold resid_in, attention_out, resid_mid, mlp_raw and mlp_out. Each part is recomputed from
    the stream that was recorded at its input, so an error says which entry of a row is wrong.
    """
    s, worst = captured.streams, dict.fromkeys(("attention", "post_mlp_norm", "order", "mlp_input"), 0.0)
    frozen = captured.model
    after = [*s["resid_in"][1:], frozen.final_stream]
    for at, layer in enumerate(frozen.layers):
        middle = s["resid_in"][at] if layer.parallel else s["resid_in"][at] + s["attention_out"][at]
        norm = layer.read_norm("mlp_in")
        pairs = {
            "attention": (layer.attention_out(s["resid_in"][at]), s["attention_out"][at]),
            "post_mlp_norm": (layer.mlp_added(s["mlp_raw"][at]), s["mlp_out"][at]),
            "order": (s["resid_in"][at] + s["attention_out"][at] + s["mlp_out"][at], after[at]),
            "mlp_input": (middle if norm is None else norm.forward(middle), s["mlp_in"][at]),
        }
        worst = {name: max(worst[name], relative(*pair)) for name, pair in pairs.items()}
    return worst


def relative(got: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
