"""Standard shapes of models and prompts. Weights are random at these sizes, none of them zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and a prompt.

    active: features per position (L0); targets: rows that a graph expands (K), None for every active feature;
    cross_layer: features write to every layer from their own on; decoders: the type of decoder rows.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    features: int
    active: int
    positions: int
    targets: int | None
    device: str
    cross_layer: bool = False
    decoders: str = "float32"


# gemma2b-ten is the published call of circuit-tracer: ten tokens, about 6,338 active features, all of them expanded.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("small", 8, 512, 8, 8, 64, 8_192, 32, 64, 1_024, "cpu"),
        Shape("medium", 8, 512, 8, 8, 64, 8_192, 32, 256, 512, "cpu"),
        Shape("long", 8, 512, 8, 8, 64, 8_192, 32, 1_024, 64, "cpu"),
        Shape("long4k", 8, 512, 8, 8, 64, 8_192, 32, 4_096, 64, "cpu"),
        Shape("smollm2", 30, 576, 9, 3, 64, 4_096, 32, 64, 1_024, "cpu"),
        Shape("gemma2b", 26, 2_304, 8, 4, 256, 16_384, 60, 128, 7_500, "gpu"),
        Shape("gemma2b-ten", 26, 2_304, 8, 4, 256, 16_384, 27, 10, None, "gpu"),
        Shape("gemma2b-clt", 26, 2_304, 8, 4, 256, 16_384, 60, 128, 7_500, "gpu", True, "bfloat16"),
        Shape("gemma2b-long", 26, 2_304, 8, 4, 256, 16_384, 60, 2_300, 2_048, "gpu"),
        Shape("gemma2b-long8k", 26, 2_304, 8, 4, 256, 16_384, 60, 8_192, 2_048, "gpu"),
    )
}
