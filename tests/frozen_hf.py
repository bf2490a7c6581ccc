"""The transformers model itself, with attention patterns and norm denominators frozen: a witness for edges.

It shares nothing with pycircuit's capture or frozen model. Patterns are the ones transformers returns, denominators
are read off the norm modules, and afterwards the model's own forward runs, with hooks that freeze those two and put
the MLPs' outputs of the prompt, and the changes added to them, in the MLPs' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FROZEN_PATTERNS = "frozen_patterns"


def _is_norm(name: str, module: nn.Module) -> bool:
    """True for norms of the stream; those of queries and keys only shape the patterns, which are frozen."""
    return ("RMSNorm" in type(module).__name__ or isinstance(module, nn.LayerNorm)) and not name.endswith(
        ("q_norm", "k_norm")
    )


@contextmanager
def _softmax_in_input_type() -> Iterator[None]:
    """Softmax in the type of its input: transformers asks for float32, which would round a float64 model's patterns."""
    own = nn.functional.softmax
    nn.functional.softmax = lambda x, dim=None, dtype=None, **_: own(x, dim=dim)  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.softmax = own


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


class FrozenHFModel:
    """A transformers model frozen on one prompt.

    read: [layers, positions, width], the transcoders' inputs; written: [layers, positions, width], the outputs that
    they replace. skip: a [width, width] or None for each layer: x @ skip stays live, the rest of an MLP is frozen.
    """

    def __init__(self, model: Any, ids: Tensor, reads: str, writes: str, skip: Sequence[Tensor | None]) -> None:
        self.model, self.ids = model, ids
        self.reads, self.writes, self.skip = reads, writes, skip
        base = getattr(model.base_model, "language_model", model.base_model)
        self.layers = list(base.layers if hasattr(base, "layers") else base.h)
        self.sigma: dict[nn.Module, Tensor] = {}
        self.latest_reads: list[Tensor] = [torch.empty(0)] * len(self.layers)
        self.prompt_writes: list[Tensor] = [torch.empty(0)] * len(self.layers)
        self.added: Tensor | None = None
        with self._hooks(), _attention(model, "eager"), _softmax_in_input_type():
            self.patterns = self._forward(1, output_attentions=True).attentions
        self.read = torch.cat(self.latest_reads)
        self.written = torch.cat(self.prompt_writes)

    def run(self, added: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run several interventions at once: every layer's transcoder inputs, and the logits before any softcap.

        added: [runs, layers, positions, width], to what the MLPs write; tokens: [runs, positions], how many times
        more each token's embedding enters -> [layers, runs, positions, width], [runs, positions, vocabulary].
        """
        self.added = added
        logits: list[Tensor] = []
        model = self.model
        transformers.AttentionInterface.register(FROZEN_PATTERNS, self._frozen_attention)
        with ExitStack() as stack:
            stack.enter_context(self._hooks())
            stack.enter_context(_attention(model, FROZEN_PATTERNS))
            hooks = (
                model.get_input_embeddings().register_forward_hook(lambda m, x, out: out * (1 + tokens)[..., None]),
                model.get_output_embeddings().register_forward_hook(lambda m, x, out: logits.append(out)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
            self._forward(len(added))
        return torch.stack(self.latest_reads), logits[0]

    def _forward(self, runs: int, **options: Any) -> Any:
        with torch.no_grad():
            return self.model(input_ids=self.ids.expand(runs, -1), use_cache=False, **options)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [m.register_forward_hook(self._norm) for n, m in self.model.named_modules() if _is_norm(n, m)]
        for index, layer in enumerate(self.layers):
            mlp_norm, post_norm = _around_mlp(layer)
            reader = layer.mlp if self.reads == "mlp_in" or mlp_norm is None else mlp_norm
            writer = layer.mlp if self.writes == "mlp_raw" or post_norm is None else post_norm
            handles.append(reader.register_forward_pre_hook(self._reader(index, mlp_norm), with_kwargs=True))
            handles.append(writer.register_forward_hook(self._writer(index)))  # after the norm's own
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm(self, norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0] - args[0].mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else args[0]
        gain = norm.weight + float("Gemma" in type(norm).__name__)
        bias = getattr(norm, "bias", None)
        if self.added is None:
            eps = getattr(norm, "variance_epsilon", None) or norm.eps
            self.sigma[norm] = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        exact = gain * x / self.sigma[norm] + (0 if bias is None else bias)
        if self.added is None:
            torch.testing.assert_close(exact, out, rtol=1e-4, atol=1e-5)  # out went through float32
        return exact

    def _reader(self, index: int, mlp_norm: nn.Module | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if self.reads == "mlp_normed" and mlp_norm is not None:
                centred = x - x.mean(-1, keepdim=True) if isinstance(mlp_norm, nn.LayerNorm) else x
                eps = getattr(mlp_norm, "variance_epsilon", None) or mlp_norm.eps
                own_sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
                x = centred / (own_sigma if self.added is None else self.sigma[mlp_norm])
            self.latest_reads[index] = x

        return hook

    def _writer(self, index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, out: Any) -> Any:
            if self.added is None:
                self.prompt_writes[index] = out[0] if isinstance(out, tuple) else out
                return None
            written, skip = self.written[index] + self.added[:, index], self.skip[index]
            if skip is not None:
                written = written + (self.latest_reads[index] - self.read[index]) @ skip
            return (written, *out[1:]) if isinstance(out, tuple) else written

        return hook

    def _frozen_attention(
        self, owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """value: [runs, kv_heads, positions, width] -> [runs, positions, heads, width]."""
        pattern = self.patterns[owner.layer_idx]
        groups = pattern.shape[1] // value.shape[1]
        return (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


def _around_mlp(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms before and after the MLP, by the names transformers gives them."""
    after = getattr(layer, "post_feedforward_layernorm", None)
    names = ("pre_feedforward_layernorm",) if after is not None else ("ln_2", "post_attention_layernorm")
    return next((getattr(layer, n) for n in names if hasattr(layer, n)), None), after
