"""A cross-layer transcoder left in its files: memory and time of a graph, and reading from a cold disk.

    python benchmarks/lazy.py [--threads N] [--folder F]        or: make bench-lazy

Writes 2 GB of transcoders, shaped as gemma-2-2b's but narrower (26 layers, bfloat16), measures, and removes them.
Three figures, each next to what it is a share of: what a graph holds beside the model, next to the size of the files
and the rows that are active; its time next to the same graph with everything in memory, the pages of the files warm;
and decoder rows read after the system has dropped them, next to the fastest of plain reads of such rows.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import pycircuit as pc
from pycircuit.bench import memory
from pycircuit.transcoders import formats
from pycircuit.transcoders.formats.files import safetensors_header

LAYERS, WIDTH, FEATURES, ACTIVE = 26, 1152, 2304, 16
POSITIONS, ROWS, ROUNDS = 32, 32, 3
COLD_LAYERS, COLD_ROWS = 3, 400
DISK = 3 << 30  # bytes that must be free
BLOCK = 512  # decoder rows that are drawn, and written again and again


def write(folder: Path) -> None:
    """The files of circuit-tracer's layout. Encoders are random; decoders are one random block many times."""
    g = torch.Generator().manual_seed(0)
    theta = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - ACTIVE / FEATURES)))
    block = torch.randn(BLOCK, WIDTH, generator=g).mul_((WIDTH * ACTIVE * LAYERS) ** -0.5).bfloat16()
    raw = block.view(-1).view(torch.uint8).numpy().tobytes()
    for at in range(LAYERS):
        tensors = {
            f"W_enc_{at}": torch.randn(FEATURES, WIDTH, generator=g).mul_(WIDTH**-0.5).bfloat16(),
            f"b_enc_{at}": torch.zeros(FEATURES).bfloat16(),
            f"b_dec_{at}": torch.zeros(WIDTH).bfloat16(),
            f"threshold_{at}": torch.full((FEATURES,), theta),
        }
        save_file(tensors, folder / f"W_enc_{at}.safetensors")
        with (folder / f"W_dec_{at}.safetensors").open("wb") as file:
            file.write(safetensors_header({f"W_dec_{at}": (torch.bfloat16, (FEATURES, LAYERS - at, WIDTH))}))
            for begin in range(0, FEATURES * (LAYERS - at), BLOCK):
                file.write(raw[: min(BLOCK, FEATURES * (LAYERS - at) - begin) * 2 * WIDTH])
            file.flush()
            os.fsync(file.fileno())
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_kind: cross_layer_transcoder\n{hooks}")


def language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def traced(model: Any) -> pc.Graph:
    ids = torch.randint(0, 512, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    return pc.attribute(model, ids, max_features=ROWS, progress=False)


def active_bytes(graph: pc.Graph) -> int:
    """Of the decoder rows that a graph uses, each once."""
    used = torch.unique(graph.features[:, [0, 2]], dim=0)
    return int((LAYERS - used[:, 0]).sum()) * WIDTH * 2


def measure_memory(folder: Path) -> dict[str, int]:
    """In a process of its own: the most that is held beside the model, with and without pages of the files."""
    hf_model = language_model()
    before, own_before = memory.restart_peak(), memory.own()
    if before is None or own_before is None:
        raise SystemExit("bench-lazy: memory can be measured on Linux only")
    most, done = [own_before], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], memory.own() or 0)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        graph = traced(pc.ReplacementModel(hf_model, formats.load(folder)))
    finally:
        done.set()
        watcher.join()
    peak = memory.peak() or 0
    return {"peak": peak - before, "own": most[0] - own_before, "rows": active_bytes(graph),
            "features": len(graph.features)}  # fmt: skip


def in_its_own_process(folder: Path, threads: int) -> dict[str, int]:
    words = [sys.executable, __file__, "--folder", str(folder), "--threads", str(threads), "--only-memory"]
    found: dict[str, int] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found


def measure_time(folder: Path) -> tuple[float, float, float]:
    """Medians of a graph's seconds (from files, in memory), in turns; and how far their edges are apart."""
    hf_model = language_model()
    models = [pc.ReplacementModel(hf_model, formats.load(folder, lazy=lazy)) for lazy in (True, False)]
    graphs = [traced(model) for model in models]
    assert torch.equal(graphs[0].features, graphs[1].features)
    assert all(graph.certificate < 1e-5 for graph in graphs)
    apart = float((graphs[0].rows.weight - graphs[1].rows.weight).abs().max() / graphs[1].rows.weight.abs().max())
    del graphs
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for model, into in zip(models, seconds, strict=True):
            begin = time.perf_counter()
            traced(model)
            into.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), apart


def drop_pages(folder: Path) -> None:
    for path in folder.glob("W_dec_*"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def rate(folder: Path, read: Callable[[int, torch.Tensor], int], seed: int) -> float:
    """Bytes a second of `read(layer, rows)`, which returns how many it read, after the pages were dropped."""
    g = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(FEATURES, generator=g)[:COLD_ROWS].sort().values for _ in range(COLD_LAYERS)]
    drop_pages(folder)
    begin = time.perf_counter()
    size = sum(read(layer, rows) for layer, rows in enumerate(chosen))
    return size / (time.perf_counter() - begin)


def measure_cold(folder: Path) -> tuple[float, dict[int, float]]:
    """(our rate, rates of plain reads by the number of threads): medians, in turns."""
    decoders = formats.load(folder).w_dec

    def ours(layer: int, rows: torch.Tensor) -> int:
        read = decoders[layer].rows(rows)
        return int(read.numel()) * 2

    def plain(threads: int) -> Callable[[int, torch.Tensor], int]:
        def read(layer: int, rows: torch.Tensor) -> int:
            plane = decoders[layer].planes[0]
            file = os.open(plane.path, os.O_RDONLY)
            size, begin = plane.stride, plane.offset
            with ThreadPoolExecutor(threads) as pool:
                each = pool.map(lambda r: os.preadv(file, [bytearray(size)], begin + r * size), rows.tolist())
                sizes = list(each)
            os.close(file)
            return sum(sizes)

        return read

    ways = {0: ours, **{n: plain(n) for n in (1, 8, 32)}}
    found: dict[int, list[float]] = {n: [] for n in ways}
    for turn in range(ROUNDS):
        for n, read in ways.items():
            found[n].append(rate(folder, read, 10 * turn + n))
    medians = {n: statistics.median(rates) for n, rates in found.items()}
    return medians.pop(0), medians


def report(folder: Path, threads: int) -> None:
    files = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{LAYERS} layers x {FEATURES} features, width {WIDTH}, bfloat16: {files / 1e9:.2f} GB of files")
    print(f"{POSITIONS} tokens, {ROWS} features expanded; {threads} threads, load {os.getloadavg()[0]:.1f}")
    held = in_its_own_process(folder, threads)
    over = {name: (held[name] - held["rows"]) / files for name in ("peak", "own")}
    print(
        f"memory: {held['features']} active features, rows of {held['rows'] / 1e6:.0f} MB; beside the model at most "
        f"{held['peak'] / 1e6:.0f} MB with pages of the files, {held['own'] / 1e6:.0f} MB without; beyond the rows "
        f"{over['peak']:.1%} and {over['own']:.1%} of the files (target 10%)"
    )
    lazy, whole, apart = measure_time(folder)
    print(
        f"time: {lazy:.2f} s from files, {whole:.2f} s in memory: {lazy / whole:.2f}x (target 1.3x); edges {apart:.0e}"
    )
    ours, plain = measure_cold(folder)
    best = max(plain, key=lambda n: plain[n])
    print(
        f"cold: {ours / 1e6:.0f} MB/s; plain reads {', '.join(f'{r / 1e6:.0f} with {n}' for n, r in plain.items())} "
        f"threads; {ours / plain[best]:.0%} of the best (target 60%)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write, or what was written; kept then")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.only_memory:
        print(json.dumps(measure_memory(asked.folder)))
        return
    above = Path(__file__).parents[1] / "build" if asked.folder is None else asked.folder.parent
    above.mkdir(exist_ok=True)
    if shutil.disk_usage(above).free < DISK:
        raise SystemExit(f"bench-lazy: {above} must have {DISK >> 30} GiB free; say --folder elsewhere")
    with tempfile.TemporaryDirectory(dir=above) as place:
        folder = Path(place) if asked.folder is None else asked.folder
        if not (folder / "config.yaml").exists():
            folder.mkdir(exist_ok=True)
            write(folder)
        report(folder, asked.threads)


if __name__ == "__main__":
    main()
