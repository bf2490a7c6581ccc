"""One forward of a transformers model, on one copy and without a tape, that leaves everything frozen behind.

Attention goes through transformers' attention interface, which hands over query and key after rotary
embedding and norms: no family needs code of its own. The rest is read by hooks on the modules a row names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pycircuit.ops import Attention, RecomputedAttention, StoredAttention

from .families import Family, FamilyError
from .frozen import BLOCK, FrozenLayer, FrozenModel, FrozenNorm
from .release import trim
from .weights import LayerWeights, ModelWeights, Norm, module

IMPLEMENTATION = "pycircuit_capture"
# (module, query, key, value, what else transformers says) -> [prompts, positions, heads, width]
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
STREAMS = ("resid_in", "attention_out", "resid_mid", "mlp_normed", "mlp_in", "mlp_raw", "mlp_out")

_RUNNING: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MAKING = Lock()

_current: ContextVar[Attend | None] = ContextVar("pycircuit_capture", default=None)


def running(model: nn.Module) -> Any:
    """The lock of a model, held while it runs: hooks see every forward, through whatever object."""
    with _MAKING:
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
    lean: bool = False
    attention: dict[int, Attention] = field(default_factory=dict)
    norms: dict[tuple[int, str], FrozenNorm] = field(default_factory=dict)
    windows: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    position_part: Tensor | None = None
    first_stream: Tensor | None = None
    final_stream: Tensor | None = None

    def write(self, name: str, layer: int, value: Tensor) -> None:
        if name in self.streams:
            self.streams[name][layer] = value[0]

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


def _attend(
    owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """The attention function given to transformers. query: [prompts, heads, positions, width]."""
    act = _current.get()
    if act is None or attention_mask is None:
        raise RuntimeError(f"capture: attention must run inside a capture, with a mask, got {type(owner).__name__}")
    return act(owner, query, key, value, {**how, "attention_mask": attention_mask}), None


def layer_at(layer_of: dict[int, int], owner: nn.Module) -> int:
    if id(owner) not in layer_of:
        raise RuntimeError(f"capture: attention must be in a layer that the row names, got {type(owner).__name__}")
    return layer_of[id(owner)]


@contextmanager
def attending(model: nn.Module, act: Attend) -> Iterator[None]:
    """`act` computes attention while this is open, in this thread."""
    token = _current.set(act)
    try:
        with attention_by(model, IMPLEMENTATION):
            yield
    finally:
        _current.reset(token)


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
    step = max(1, BLOCK // max(1, heads * positions))
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


def _mask(*args: Any, **how: Any) -> Tensor:
    """The mask function given to transformers: the whole [1, 1, positions, positions] of booleans, never skipped."""
    from transformers.masking_utils import sdpa_mask

    how.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = sdpa_mask(*args, **how)
    assert mask is not None  # nothing may be skipped
    return mask


@contextmanager
def attention_by(model: nn.Module, name: str) -> Iterator[None]:
    """transformers computes attention as `name` says while this is open; the model's own choice comes back after.

    "eager" is what a family means: other implementations drop softcaps or scales in some versions.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, chosen in before:
            config._attn_implementation = chosen


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _output(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


class _Hooks:
    """Hooks on the modules of a row, writing into a recorder; removed together."""

    def __init__(self, row: Family, recorder: _Recorder) -> None:
        self.row, self.recorder, self.handles = row, recorder, []  # type: tuple[Family, _Recorder, list[Any]]

    def put(self, model: nn.Module) -> None:
        row, recorder = self.row, self.recorder
        layers = list(module(model, row.layers, row).children())
        for at, (layer, weights) in enumerate(zip(layers, recorder.weights.layers, strict=True)):
            self._layer(at, layer, weights)
        if row.position_embedding is not None:
            self._after(module(model, row.position_embedding, row), self._positions)
        self._norm(-1, module(model, row.final_norm, row), "final_norm", recorder.weights.final_norm)

    def _before(self, of: nn.Module, act: Callable[[Tensor], None]) -> None:
        self.handles.append(
            of.register_forward_pre_hook(lambda _, args, kwargs: act(_first(args, kwargs)), with_kwargs=True)
        )

    def _after(self, of: nn.Module, act: Callable[[Tensor], Any]) -> None:
        self.handles.append(of.register_forward_hook(lambda _, args, out: act(_output(out))))

    def _layer(self, at: int, layer: nn.Module, weights: LayerWeights) -> None:
        row, write = self.row, self.recorder.write
        self.recorder.layer_of.update((id(m), at) for m in layer.modules())
        self._before(layer, lambda x: self._enter(at, x))
        for name in ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm"):
            path, norm = getattr(row, name), getattr(weights, name)
            if path is not None:
                self._norm(at, module(layer, path, row), name, norm)
        mlp = module(layer, row.mlp, row)
        last = module(layer, row.post_attention_norm or row.output, row)
        self._after(last, lambda out: write("attention_out", at, out))
        self._before(module(layer, row.mlp_norm or row.mlp, row), lambda x: write("resid_mid", at, x))
        self._before(mlp, lambda x: write("mlp_in", at, x))
        if self.recorder.lean:
            for of in (layer, mlp):
                self._before(of, lambda _: trim())
        self._after(mlp, lambda out: write("mlp_raw", at, out))
        self._after(module(layer, row.post_mlp_norm or row.mlp, row), lambda out: write("mlp_out", at, out))

    def _enter(self, at: int, x: Tensor) -> None:
        self.recorder.write("resid_in", at, x)
        if at == 0:
            self.recorder.first_stream = x[0].to(self.recorder.weights.dtype)

    def _positions(self, out: Tensor) -> None:
        self.recorder.position_part = out.reshape(-1, out.shape[-1]).to(self.recorder.weights.dtype)

    def _norm(self, at: int, of: nn.Module, name: str, norm: Norm) -> None:
        """Denominators from the norm's own input. In float64 its output is ours: transformers' goes through float32."""

        def act(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
            x = _first(args, kwargs)
            frozen = self.recorder.norms[at, name] = norm.freeze(x[0])
            if at < 0:
                self.recorder.final_stream = x[0].to(self.recorder.weights.dtype)
            if name == "mlp_norm" and "mlp_normed" in self.recorder.streams:
                bare = FrozenNorm(frozen.sigma, None, None, frozen.center)
                self.recorder.write("mlp_normed", at, bare.forward(x[0].to(frozen.sigma.dtype))[None])
            return frozen.forward(x[0])[None] if x.dtype == torch.float64 else None

        self.handles.append(of.register_forward_hook(act, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def capture(
    model: Any,
    row: Family,
    weights: ModelWeights,
    ids: Tensor,
    record: Sequence[str] = (),
    stored: bool = True,
    settle: bool = True,
    lean: bool = False,
) -> Captured:
    """Run the prompt once and freeze it. ids: [positions]; record: which of STREAMS to keep.

    stored: keep attention patterns, otherwise query, key and log-sum-exp. settle: from a model in half
    precision take patterns and MLP outputs, and add up the streams between again in float32 (see `_settled`).
    lean: give back what each layer freed, so that the next one's tensors need not lie beside its holes.
    """
    if model.training:
        raise ValueError("capture: model must be in evaluation mode, got one in training; call model.hf_model.eval()")
    half = settle and weights.stored != weights.dtype
    wanted = {"mlp_raw"} if half else {_recorded(name, row) for name in record}
    shape = (len(weights.layers), len(ids), weights.width)
    streams = {name: torch.empty(shape, dtype=weights.dtype, device=weights.device) for name in wanted}
    recorder = _Recorder(weights, len(ids), stored, streams, {}, lean)
    hooks = _Hooks(row, recorder)
    with running(model):
        try:
            hooks.put(model)
            with torch.no_grad(), attending(model, recorder.attend):
                model.base_model(input_ids=ids[None], use_cache=False)
        finally:
            hooks.remove()
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
    handles = []
    for at, (layer, w) in enumerate(zip(module(model, row.layers, row).children(), weights.layers, strict=True)):
        before = row.mlp if reads == "mlp_in" or row.mlp_norm is None else row.mlp_norm
        norm = w.mlp_norm if reads == "mlp_normed" else None

        def act(_: nn.Module, args: Any, kwargs: Any, at: int = at, norm: Norm | None = norm) -> None:
            x = _first(args, kwargs)
            if norm is not None:
                flat = x.flatten(0, 1).to(weights.dtype)
                x = replace(norm.freeze(flat), gain=None, bias=None).forward(flat).view_as(x)
            out[at] = x

        handles.append(module(layer, before, row).register_forward_pre_hook(act, with_kwargs=True))
    try:
        with torch.no_grad(), attention_by(model, "eager"):
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _complete(recorder: _Recorder, row: Family) -> None:
    missing = [i for i in range(len(recorder.weights.layers)) if i not in recorder.attention]
    if missing or recorder.first_stream is None or recorder.final_stream is None:
        raise FamilyError(
            f"capture: the row of {row.model_type!r} must name the modules that run, got no attention in layers "
            f"{missing}; does this model use transformers' attention interface?"
        )


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
