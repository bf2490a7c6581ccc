"""THE table of model families: the module paths that a frozen forward needs, one row a family.

A row names modules, never code: attention itself is captured the same way for all (see capture). Anything done to
embeddings before the first layer (scale, norm) needs no entry, because the stream is read after it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Fused = Literal["none", "blocks", "heads"]
NormKind = Literal["rms", "layer"]


class FamilyError(ValueError):
    """Error of a model that no row describes, or that its row describes wrongly; the message says what to write."""


@dataclass(frozen=True)
class Family:
    """One family of models, by the paths of its modules.

    Paths are dotted, those of a layer from the layer on. None: the family has no such module.

    embedding, head: None where the model's get_input_embeddings() and get_output_embeddings() know them.
    value: the value projection, or with `fused` the one projection that holds query, key and value:
    "blocks" = all queries, all keys, all values; "heads" = query, key, value of each head in turn.
    transposed: projections are stored [inputs, outputs].
    gain_offset: added to a norm's weight (1 where the weight is stored as an offset from 1).
    parallel: attention and MLP both read the layer's input; or the name of the config's flag for it.
    final_softcap: the name of the config's cap on logits.
    chat_ignore_positions: positions without features for chat models (names that end in -it).
    """

    model_type: str
    embedding: str | None = None
    position_embedding: str | None = None
    layers: str = "model.layers"
    attention_norm: str | None = "input_layernorm"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    post_attention_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    post_mlp_norm: str | None = None
    final_norm: str = "model.norm"
    head: str | None = None
    norm: NormKind = "rms"
    gain_offset: float = 0.0
    fused: Fused = "none"
    transposed: bool = False
    parallel: bool | str = False
    final_softcap: str | None = None
    chat_ignore_positions: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (("norm", self.norm, get_args(NormKind)), ("fused", self.fused, get_args(Fused))):
            if value not in allowed:
                raise ValueError(f"Family: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not self.model_type:
            raise ValueError("Family: model_type must be the model_type of the model's config, got ''")


_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
    "gain_offset": 1.0,
    "final_softcap": "final_logit_softcapping",
}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "gpt2", position_embedding="transformer.wpe", layers="transformer.h",
            attention_norm="ln_1", value="attn.c_attn", output="attn.c_proj", mlp_norm="ln_2",
            final_norm="transformer.ln_f", norm="layer", fused="blocks", transposed=True,
        ),
        Family(
            "gpt_neox", layers="gpt_neox.layers", value="attention.query_key_value",
            output="attention.dense", final_norm="gpt_neox.final_layer_norm", norm="layer", fused="heads",
            parallel="use_parallel_residual",
        ),
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("gemma2", **_GEMMA),  # type: ignore[arg-type]
        Family("gemma3_text", chat_ignore_positions=4, **_GEMMA),  # type: ignore[arg-type]
        Family(  # the text model beside a vision tower, which caps no logits
            "gemma3", layers="model.language_model.layers", final_norm="model.language_model.norm",
            chat_ignore_positions=4, **{**_GEMMA, "final_softcap": None},  # type: ignore[arg-type]
        ),
        Family(
            "olmo2", attention_norm=None, post_attention_norm="post_attention_layernorm", mlp_norm=None,
            post_mlp_norm="post_feedforward_layernorm",
        ),
        Family("phi3", value="self_attn.qkv_proj", fused="blocks"),
        Family("gpt_oss"),
    )
}  # fmt: skip


def register_family(family: Family | None = None, **row: str | float | bool | None) -> Family:
    """Add a row (or replace one): `register_family(model_type="mine", layers="decoder.blocks", ...)`.

    The row is put to the test whenever a model of this type is opened: a short prompt must come out of the
    frozen model as it comes out of the model, otherwise FamilyError says which part differs.
    """
    if family is not None and row:
        raise TypeError("register_family: give a Family or its fields, got both")
    if family is None:
        known = [field.name for field in fields(Family)]
        unknown = sorted(set(row) - set(known))
        if unknown or "model_type" not in row:
            got = ", ".join(unknown) if unknown else "no model_type"
            raise TypeError(f"register_family: fields must be among {', '.join(known)}, got {got}")
        family = Family(**row)  # type: ignore[arg-type]
    if not isinstance(family, Family):
        raise TypeError(f"register_family: family must be a Family, got {type(family).__name__}")
    FAMILIES[family.model_type] = family
    return family


def family_of(model: Any) -> Family:
    """The row of a transformers model, by its config's model_type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(f"ReplacementModel: model must be a transformers causal model, got {type(model).__name__}")
    if model_type not in FAMILIES:
        raise FamilyError(
            f"ReplacementModel: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}; describe it "
            f"first: pc.register_family(model_type={model_type!r}, layers=..., attention_norm=..., value=..., "
            "output=..., mlp_norm=..., mlp=..., final_norm=..., norm='rms' or 'layer'), "
            "with the module paths that print(model) shows (help(pc.Family) explains each)"
        )
    return FAMILIES[model_type]
