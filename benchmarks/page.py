"""First view and frames a second of the page at 500, 2,000 and 8,000 nodes, in headless Chromium."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

import pycircuit as pc

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "page"))
from browser import launched

LAYERS, POSITIONS = 26, 40
SIZES = {500: 8_000, 2_000: 50_000, 8_000: 50_000}  # nodes: edges
FRAMES = """async (move) => {
  const frame = document.querySelector(".graph-frame");
  const box = frame.getBoundingClientRect();
  const send = (type, x, y) => frame.dispatchEvent(new PointerEvent(type, {
    clientX: box.left + x, clientY: box.top + y, pointerId: 1, bubbles: true, isPrimary: true }));
  frame.setPointerCapture = () => undefined;
  if (move === "pan") send("pointerdown", 500, 200);
  const times = [];
  for (let i = 0; i < 90; i++) {
    const angle = i / 9;
    send("pointermove", 500 + 180 * Math.sin(angle), 200 + 120 * Math.cos(angle * 1.3));
    times.push(await new Promise(requestAnimationFrame));
  }
  if (move === "pan") send("pointerup", 500, 200);
  const gaps = times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b);
  return { rate: 1000 * gaps.length / (times.at(-1) - times[0]), slow: gaps[Math.floor(gaps.length * 0.95)] };
}"""


def synthetic_graph(nodes: int, edges: int) -> pc.Graph:
    """A graph of this many features, each reading from random features below it."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.randint(0, LAYERS, (nodes,), generator=generator).sort().values
    position = torch.randint(1, POSITIONS, (nodes,), generator=generator)
    features = torch.stack([layer, position, torch.arange(nodes)], 1)
    first_token = nodes + LAYERS * POSITIONS
    target = first_token + POSITIONS
    per_row = edges // nodes
    columns, pointers = [], [0]
    for node in range(nodes):
        below = int((layer < layer[node]).sum())
        row = (
            torch.randint(0, below, (per_row,), generator=generator).unique()
            if below
            else torch.tensor([first_token + 1])
        )
        columns.append(row)
        pointers.append(pointers[-1] + len(row))
    columns.append(torch.arange(nodes - min(nodes, 400), nodes))
    pointers.append(pointers[-1] + len(columns[-1]))
    column = torch.cat(columns).int()
    weight = torch.randn(len(column), generator=generator)
    return graph_of(features, column, weight, torch.tensor(pointers), target)


def graph_of(
    features: torch.Tensor, column: torch.Tensor, weight: torch.Tensor, row_ptr: torch.Tensor, target: int
) -> pc.Graph:
    """Return the graph of these rows: one for each feature and one for the target."""
    from pycircuit.graph.csr import Rows
    from pycircuit.graph.endpoints import Targets, Tokens

    rows = len(row_ptr) - 1
    return pc.Graph(
        features=features,
        values=torch.ones(len(features)),
        rows=Rows(row_ptr, column, weight),
        row_node=torch.tensor([*range(len(features)), target]),
        bias=torch.zeros(rows),
        preactivation=torch.zeros(rows),
        targets=Targets([" word"], torch.tensor([1]), torch.tensor([1.0]), torch.tensor([POSITIONS - 1])),
        tokens=Tokens(torch.arange(POSITIONS), [f" t{i}" for i in range(POSITIONS)]),
        layers=LAYERS,
        prompt="a synthetic prompt",
    )


def main() -> None:
    """Print a line for each size."""
    torch.set_num_threads(1)
    sys.stdout.write(f"{os.cpu_count()} cores, headless Chromium without a GPU, 1,440 x 900\n")
    sys.stdout.write("nodes   edges    first view   complete   panning        hovering\n")
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        for nodes, edges in SIZES.items():
            synthetic_graph(nodes, edges).save(Path(folder) / f"{nodes}.safetensors")
        with pc.serve(folder, port=0) as server:
            for nodes in SIZES:
                sys.stdout.write(measure(browser, server.address, nodes) + "\n")


def measure(browser: object, address: str, nodes: int) -> str:
    """Open a graph with nothing pruned: its times and frame rates as a line."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()  # type: ignore[attr-defined]
    page.goto(f"{address}#g={nodes}.safetensors&n=1&e=1&hide=errors")
    marks = "performance.getEntriesByName('pycircuit-%s').map((mark) => mark.startTime)"
    for _ in range(600):
        if page.evaluate(marks % "complete"):
            break
        page.wait_for_timeout(50)
    first, complete = (page.evaluate(marks % name)[0] for name in ("first-view", "complete"))
    shown = page.evaluate("[...document.querySelectorAll('.counts b')].map((b) => b.textContent)")
    pan = page.evaluate(FRAMES, "pan")
    page.wait_for_timeout(1500)
    hover = page.evaluate(FRAMES, "hover")
    page.context.close()
    rates = "   ".join(f"{f['rate']:3.0f}/s (95%: {f['slow']:.0f} ms)" for f in (pan, hover))
    return f"{shown[0]:>6}  {shown[1]:>6}   {first / 1000:6.2f} s   {complete / 1000:6.2f} s   {rates}"


if __name__ == "__main__":
    main()
