"""Compile every Triton kernel for a generation of cards, without a GPU, and print its resources as JSON.

Run by test_compiled_kernels.py as `compile_kernels.py COMPUTE`, 90 for compute 9.0, in a process of its own: under one
triton or another, and with TRITON_INTERPRET=0, since kernels must be compilable here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import triton
from pycircuit.kernels import attend_back, decode, edge_scores, encode, influence, norm_back, select, split, spread
from pycircuit.kernels.config import Config, config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Arguments at the standard shapes: widths and strides are multiples of 16, counts may be anything.
FLOATS = (
    "b",
    "threshold",
    "staged",
    "value",
    "out",
    "sample",
    "kth",
    "bias",
    "gradient",
    "y",
    "pattern",
    "normaliser",
    "z",
    "rows",
    "weight",
    "entering",
    "row_sum",
    "scale",
    "sigma",
    "gain",
    "vectors",
    "column_sigma",
    "row_sigma",
)
TYPES = {
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(("packed", "counts", "kept_counts", "wrong"), "*i32"),
    **dict.fromkeys(("cursor", "begins", "ends", "index", "column", "row_ptr", "prefix_ptr", "node", "order"), "*i64"),
    **dict.fromkeys(("cell", "layer", "position", "query"), "*i64"),
    **dict.fromkeys(("floor", "softcap"), "fp32"),
    "keep_mask": "*i8",
}
STRIDES = ("row_stride", "x_stride", "w_stride", "g_stride", "slot_stride", "stride", "out_stride", "vector_stride")
ALIGNED = ("width", "columns", "length", "qk_width", "pitch", *STRIDES)
SHORT = {"float32": "fp32", "bfloat16": "bf16"}

Row = tuple[str, str, Any, Config, dict[str, Any], dict[str, str]]


def variants() -> Iterator[Row]:
    """(kernel, variant, function, configuration, other constants, types of its own)."""
    rules = {"number": (0, True), "vector": (1, False), "topk": (2, True), "topk_signed": (2, False)}
    for shape, c in encode.HOPPER.items():
        w = {"x": "*fp32", "w": "*" + SHORT[shape.split("_")[0]]}
        for rule, (number, floor) in rules.items():
            if shape.endswith("_64") and rule in ("number", "topk_signed"):
                continue  # as the others, in blocks that leave more room
            yield "encode.product", f"{shape} {rule}", encode.product_kernel, c, {"RULE": number, "FLOOR": floor}, w
        yield "encode.sample", shape, encode.sample_kernel, c, {}, w
        blocks = config(4, 1, BP=c["BP"], BF=c["BF"])
        yield "encode.place", shape, encode.place_kernel, blocks, {}, {}
    both = {"x": "*bf16", "w": "*bf16"}
    yield "encode.product", "bfloat16 x too", encode.product_kernel, c, {"RULE": 1, "FLOOR": False}, both
    yield "encode.kth", "", select.kth_kernel, select.ROWS, {}, {}
    yield "encode.keep", "", select.keep_kernel, select.ROWS, {}, {}
    for (shape, c), bias in product(decode.HOPPER.items(), (False, True)):
        w = {"w_dec": "*" + SHORT[shape]}
        yield "decode", shape + " bias" * bias, decode.decode_kernel, c, {"HAS_BIAS": bias}, w
    for shape in SHORT:  # where positions are few, the same blocks are shared out
        c = edge_scores.HOPPER[shape]
        w = {"w_dec": "*" + SHORT[shape]}
        for several, parts in ((False, 3), (False, 2), (False, 1), (True, 3)):
            name = shape + " several layers" * several + f" {parts} parts" * (parts < 3)
            yield "edge_scores", name, edge_scores.edge_scores_kernel, c, {"SEVERAL": several, "PARTS": parts}, w
    for dtype in SHORT.values():
        yield (
            "edge_scores.one_each",
            dtype,
            edge_scores.one_each_kernel,
            edge_scores.ONE_EACH,
            {},
            {"w_dec": "*" + dtype},
        )
    for divided in (False, True):
        constants, own = {"COUNT": 3, "DIVIDED": divided}, {"numbers": "*fp32", "parts": "*bf16"}
        yield "split", "divided" * divided, split.split_kernel, split.BLOCK, constants, own
    for several in (False, True):
        constants, name = {"HAS_GAIN": True, "HAS_LAYER": several}, "several layers" * several
        yield "norm_back", name, norm_back.norm_back_kernel, norm_back.BLOCK, constants, {}
    for in_place, normed in product((False, True), (False, True)):
        constants = {"HAS_QUERY": in_place, "HAS_COLUMN_SIGMA": normed, "HAS_ROW_SIGMA": normed}
        name = ("in place" * in_place + " normed" * normed).strip()
        yield "spread", name, spread.spread_kernel, spread.BLOCK, constants, {}
    yield from attentions()
    for ordered in (False, True):
        constants, name, own = {"HAS_ORDER": ordered}, "ordered" * ordered, {"scale": "*fp32"}
        yield "influence.sum", name, influence.sum_kernel, influence.ROWS, constants, {}
        yield "influence.solve", name, influence.solve_kernel, influence.ROWS, constants, own
        for shape, c in influence.HOPPER.items():
            yield "influence.total", f"{shape} {name}".strip(), influence.total_kernel, c, constants, own


def attentions() -> Iterator[Row]:
    kernel, pattern = attend_back.attend_back_kernel, attend_back.pattern_kernel
    for (shape, c), (window, parts) in product(
        attend_back.HOPPER.items(), ((False, 3), (False, 2), (False, 1), (True, 3))
    ):
        name = shape + " window" * window + f" {parts} parts" * (parts < 3)
        yield "attend_back", name, kernel, c, {"WINDOW": window, "PARTS": parts}, {}
    for (dtype, c), softcap, window in product(attend_back.PATTERN.items(), (False, True), (False, True)):
        name = str(dtype).removeprefix("torch.")
        own = {"query": "*" + SHORT[name], "key": "*" + SHORT[name], "scale": "fp32"}
        constants = {"SOFTCAP": softcap, "WINDOW": window}
        yield "attend_back.pattern", name + " softcap" * softcap + " window" * window, pattern, c, constants, own


def compiled(kernel: Any, c: Config, constants: dict[str, Any], own: dict[str, str], compute: int) -> Any:
    constants = {**dict(c.blocks), **constants}
    types = {n: "constexpr" if n in constants else own.get(n) or TYPES.get(n, "i32") for n in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, type_) in enumerate(types.items())
        if (type_.startswith("*") or (type_ == "i32" and name in ALIGNED)) and _specialised(kernel.params[index])
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {k: v for k, v in c.launch().items() if k.islower()}
    source = ASTSource(kernel, types, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", compute, 32), options=options)


def _specialised(parameter: Any) -> bool:
    return not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def inspect(binary: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    usage_counts = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": usage_counts["REG"],
        "spilled": usage_counts["STACK"] + usage_counts["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": binary.metadata.shared,
        "loads": _widest(code, r"LDG(?:STS)?"),
        "stores": _widest(code, "STG"),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "mma": len(re.findall(r"\bHMMA\b", code)),
    }


def _widest(code: str, instruction: str) -> int:
    """Return the bits of the widest access to global memory by such an instruction, 0 where there is none."""
    names = re.findall(rf"\b{instruction}(?:\.\w+)*", code)
    return max((next((b for b in (128, 64) if f".{b}" in name), 32) for name in names), default=0)


def measured(number: int, compute: int) -> dict[str, Any]:
    kernel, variant, function, c, constants, own = list(variants())[number]
    row = {"kernel": kernel, "variant": variant, "warps": c.warps, "stages": c.stages}
    try:
        return {**row, **inspect(compiled(function, c, constants, own, compute))}
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error)[:200]}"}


def main() -> None:
    compute = int(sys.argv[1])
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(partial(measured, compute=compute), range(len(list(variants())))))
    json.dump({"triton": triton.__version__, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    main()
