"""A cross-layer transcoder left in its files: memory and time of a graph, and reading from a cold disk.

    python benchmarks/lazy.py [--shape scaled|full] [--threads N]      or: make bench-lazy, which writes RESULTS.md

`scaled` is 2 GB, shaped like gemma-2-2b's but narrower (26 layers, bfloat16), written, measured and removed. Three
figures: the memory of a graph beside the model, against the size of the files and the active rows; its time, against
the same graph with everything in memory, the files' pages warm; and the rate of reading decoder rows that are not in
the page cache, against the fastest plain reads of such rows. `full` has the full shape, 28 GB, for the first figure:
encoders are written, and only those decoder rows that the prompt needs, with holes in the files for the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import command_line
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import pycircuit as pc
from pycircuit.bench import machine_rates, memory
from pycircuit.bench.whole_trace import markdown_table
from pycircuit.files.safetensors import safetensors_header

FOLDER = Path(__file__).parent
ACTIVE = 16  # features of a layer at a position
POSITIONS, ROWS = 32, 32
ROUNDS = 3
COLD_LAYERS, COLD_ROWS = 3, 400
SPARE = 1 << 30  # bytes of the disk to leave free
BLOCK = 512  # distinct decoder rows, written repeatedly
HEADER = ("layers x features", "files GB", "active features", "their rows MB", "held MB", "beyond", "seconds", "law")


@dataclass(frozen=True)
class Shape:
    """Sizes of a cross-layer transcoder; with holes, only the decoder rows that the prompt needs are written."""

    layers: int
    features: int
    width: int
    holes: bool = False

    def slots(self, layer: int) -> int:
        """Number of layers that a layer's features write to."""
        return self.layers - layer

    @property
    def disk(self) -> int:
        """Most bytes that writing takes."""
        written = min(self.features, ACTIVE * POSITIONS) if self.holes else self.features
        return 2 * self.width * sum(self.features + written * self.slots(layer) for layer in range(self.layers))


SHAPES = {"scaled": Shape(26, 2304, 1152), "full": Shape(26, 16384, 2304, holes=True)}


# Files


def write(shape: Shape, folder: Path) -> None:
    """Write files in circuit-tracer's layout, encoders random, decoders a random block repeated."""
    g = torch.Generator().manual_seed(0)
    theta = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - ACTIVE / shape.features)))
    scale = (shape.width * ACTIVE * shape.layers) ** -0.5
    block = torch.randn(BLOCK, shape.width, generator=g).mul_(scale).bfloat16()
    for layer in range(shape.layers):
        encoder = torch.randn(shape.features, shape.width, generator=g).mul_(shape.width**-0.5)
        tensors = {
            f"W_enc_{layer}": encoder.bfloat16(),
            f"b_enc_{layer}": torch.zeros(shape.features).bfloat16(),
            f"b_dec_{layer}": torch.zeros(shape.width).bfloat16(),
            f"threshold_{layer}": torch.full((shape.features,), theta),
        }
        save_file(tensors, folder / f"W_enc_{layer}.safetensors")
        write_decoder(shape, folder, layer, [], block)
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_kind: cross_layer_transcoder\n{hooks}")
    for layer, rows in enumerate(needed(shape, folder)):
        write_decoder(shape, folder, layer, rows, block)


def needed(shape: Shape, folder: Path) -> list[list[int]]:
    """Decoder rows to write, by layer."""
    if not shape.holes:
        return [list(range(shape.features))] * shape.layers
    model = pc.ReplacementModel(language_model(shape), pc.transcoders.load(folder))
    return [active.index.unique().tolist() for active in model.activations([prompt()])[0]]


def write_decoder(shape: Shape, folder: Path, layer: int, rows: list[int], block: Tensor) -> None:
    """Write the decoder file of a layer, with holes outside `rows`."""
    slots, raw = shape.slots(layer), block.repeat(2, 1).view(torch.uint8).numpy()
    header = safetensors_header({f"W_dec_{layer}": (torch.bfloat16, (shape.features, slots, shape.width))})
    size = 2 * slots * shape.width
    with (folder / f"W_dec_{layer}.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + shape.features * size)
        for row in rows:
            file.seek(len(header) + row * size)
            begin = row * slots % BLOCK
            file.write(raw[begin : begin + slots].data)
        file.flush()
        os.fsync(file.fileno())


def language_model(shape: Shape) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=shape.width,
        intermediate_size=1024,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompt() -> Tensor:
    return torch.randint(0, 512, (POSITIONS,), generator=torch.Generator().manual_seed(1))


def traced(model: Any) -> pc.Graph:
    return pc.attribute(model, prompt(), max_features=ROWS, labels=False, progress=False)


# Memory


def active_bytes(shape: Shape, graph: pc.Graph) -> int:
    """Bytes of the decoder rows that a graph uses, each once."""
    used = torch.unique(graph.features[:, [0, 2]], dim=0)
    return 2 * shape.width * int((shape.layers - used[:, 0]).sum())


@contextmanager
def most_own() -> Iterator[list[int]]:
    """Peak of the process's memory without pages of files, while the context lasts."""
    most, done = [memory.own() or 0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], memory.own() or 0)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def measure_memory(shape: Shape, folder: Path) -> dict[str, float]:
    """Peak memory beside the model, with and without pages of files; run in a process of its own."""
    hf_model = language_model(shape)
    before, own_before = memory.restart_peak(), memory.own()
    if before is None or own_before is None:
        raise SystemExit("bench-lazy: memory can be measured on Linux only")
    begin = time.perf_counter()
    with most_own() as most:
        graph = traced(pc.ReplacementModel(hf_model, pc.transcoders.load(folder)))
    seconds, peak = time.perf_counter() - begin, memory.peak() or 0
    return {
        "files": sum(p.stat().st_size for p in folder.iterdir()),
        "features": len(graph.features),
        "rows": active_bytes(shape, graph),
        "peak": peak - before,
        "own": most[0] - own_before,
        "seconds": seconds,
        "certificate": graph.certificate,
    }


def in_its_own_process(name: str, folder: Path, threads: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--shape", name, "--threads", str(threads), "--memory-of", str(folder)]
    measured: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return measured


# Time


def measure_time(shape: Shape, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds of a graph from files and from memory, in turn, and the distance of their edges."""
    hf_model = language_model(shape)
    models = [
        pc.ReplacementModel(hf_model, pc.transcoders.load(folder, lazy=from_files)) for from_files in (True, False)
    ]
    graphs = [traced(model) for model in models]
    assert torch.equal(graphs[0].features, graphs[1].features)
    assert all(graph.certificate < graph.provenance["tolerance"] for graph in graphs)
    apart = float((graphs[0].rows.weight - graphs[1].rows.weight).abs().max() / graphs[1].rows.weight.abs().max())
    del graphs
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for model, into in zip(models, seconds, strict=True):
            begin = time.perf_counter()
            traced(model)
            into.append(time.perf_counter() - begin)
    from_files, in_memory = (statistics.median(samples) for samples in seconds)
    return {"from files": from_files, "in memory": in_memory, "edges apart": apart}


# A cold disk


def drop_pages(folder: Path) -> None:
    for path in folder.glob("W_dec_*"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def rate(shape: Shape, folder: Path, read: Callable[[int, Tensor], int], seed: int) -> float:
    """Bytes per second of `read(layer, rows)`, which returns the bytes that it read, after the pages were dropped."""
    g = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(shape.features, generator=g)[:COLD_ROWS].sort().values for _ in range(COLD_LAYERS)]
    drop_pages(folder)
    begin = time.perf_counter()
    size = sum(read(layer, rows) for layer, rows in enumerate(chosen))
    return size / (time.perf_counter() - begin)


def measure_cold(shape: Shape, folder: Path, rounds: int) -> dict[str, float]:
    """Median rates, in turn: ours, and of plain reads with several numbers of threads."""
    decoders = pc.transcoders.load(folder).w_dec

    def ours(layer: int, rows: Tensor) -> int:
        read = decoders[layer].rows(rows)
        return int(read.numel()) * 2

    def plain(threads: int) -> Callable[[int, Tensor], int]:
        def read(layer: int, rows: Tensor) -> int:
            plane = decoders[layer].planes[0]
            file = os.open(plane.path, os.O_RDONLY)
            size, begin = plane.stride, plane.offset
            with ThreadPoolExecutor(threads) as pool:
                reads = pool.map(lambda r: os.preadv(file, [bytearray(size)], begin + r * size), rows.tolist())
                sizes = list(reads)
            os.close(file)
            return sum(sizes)

        return read

    ways = {"ours": ours, **{str(n): plain(n) for n in (1, 8, 32)}}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for number, (name, read) in enumerate(ways.items()):
            samples[name].append(rate(shape, folder, read, len(ways) * turn + number))
    return {name: statistics.median(rates) for name, rates in samples.items()}


# Results


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    shape, build = SHAPES[name], FOLDER.parent / "build"
    build.mkdir(exist_ok=True)
    if shutil.disk_usage(build).free < shape.disk + SPARE:
        raise SystemExit(f"bench-lazy: {name} needs {(shape.disk + SPARE) / 1e9:.0f} GB free where {build} is")
    with tempfile.TemporaryDirectory(dir=build) as created:
        folder = Path(created)
        write(shape, folder)
        measured: dict[str, Any] = {"shape": asdict(shape), "load": machine_rates.load()}
        if not shape.holes:
            measured |= {"time": measure_time(shape, folder, rounds), "cold": measure_cold(shape, folder, rounds)}
        return measured | {"memory": in_its_own_process(name, folder, threads)}


def markdown(results: dict[str, Any]) -> str:
    """Section of RESULTS.md."""
    facts, shapes = results["machine"], results["shapes"].values()
    load = max(entry["load"] for entry in shapes)
    verdicts = [
        verdict for entry in shapes if "time" in entry for verdict in (_time(entry["time"]), _cold(entry["cold"]))
    ]
    lines = [
        "# Transcoders left in their files",
        "",
        "Written by `make bench-lazy`; do not edit. Cross-layer transcoders in circuit-tracer's layout, bfloat16; a",
        f"prompt of {POSITIONS} tokens, {ROWS} features expanded. In the set of 16,384 features a layer only the",
        "decoder rows that the prompt needs are written, with holes in the files where the others would be.",
        "*held*: the most there is beside the model at any time, and that without pages of files, which the system",
        "may take back; *beyond*: what of it are not decoder rows of active features, over the size of the files.",
        "*seconds*: loading and tracing once. *law*: the certificate of the graph.",
        "",
        f"- torch {facts['torch']}, {facts['cpu']}, {results['threads']} threads, load {load:.1f}",
        *verdicts,
        "",
        *markdown_table(HEADER, [_memory_row(entry["shape"], entry["memory"]) for entry in shapes]),
    ]
    return "\n".join(lines) + "\n"


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def _time(seconds: dict[str, float]) -> str:
    from_files, in_memory, apart = seconds.values()
    return (
        f"- a graph, the files' pages warm: {from_files:.2f} s, {in_memory:.2f} s with everything in memory: "
        f"{from_files / in_memory:.2f}x, edges {apart:.0e} apart (<= 1.30x: {_met(from_files <= 1.3 * in_memory)})"
    )


def _cold(rates: dict[str, float]) -> str:
    plain = dict(rates)
    ours = plain.pop("ours")
    share = ours / max(plain.values())
    plain_rates = ", ".join(f"{rate / 1e6:.0f} with {name}" for name, rate in plain.items())
    return (
        f"- decoder rows from a cold disk: {ours / 1e6:.0f} MB/s; single rows by plain reads {plain_rates} threads; "
        f"{share:.0%} of the best (>= 60%: {_met(share >= 0.6)})"
    )


def _memory_row(shape: dict[str, Any], measured: dict[str, float]) -> tuple[str, ...]:
    beyond, own = ((measured[name] - measured["rows"]) / measured["files"] for name in ("peak", "own"))
    return (
        f"{shape['layers']} x {shape['features']}, width {shape['width']}",
        f"{measured['files'] / 1e9:.2f}",
        f"{measured['features']:.0f}",
        f"{measured['rows'] / 1e6:.0f}",
        f"{measured['peak'] / 1e6:.0f} / {measured['own'] / 1e6:.0f}",
        f"{beyond:.1%} / {own:.1%} (<= 10%: {_met(beyond <= 0.1)})",
        f"{measured['seconds']:.1f}",
        f"{measured['certificate']:.0e}",
    )


def main() -> None:
    threads = torch.get_num_threads()
    parser = command_line.parser("lazy", __doc__, threads=threads, rounds=ROUNDS, shapes=SHAPES, results=True)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        (name,) = options.shape
        print(json.dumps(measure_memory(SHAPES[name], options.memory_of)))
        return
    results = {"machine": machine_rates.facts(), "threads": options.threads}
    results["shapes"] = {name: measure(name, options.threads, options.rounds) for name in options.shape or SHAPES}
    command_line.publish(options, "lazy", results, markdown(results))


if __name__ == "__main__":
    main()
