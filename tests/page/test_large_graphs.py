"""Deep and long graphs: everything in sight at first, nothing on top of something else, texts large enough to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from page_steps import drawn, open_graph, places, select, wait_until
from playwright.sync_api import Page, expect
from sparse_graphs import sparse_graph

import pycircuit as pc

SMALLEST_TEXT, SMALLEST_NODE = 9.0, 5.0  # pixels
FONT = 12.0
# name -> (layers, positions, features)
SIZES = {"deep30": (30, 10, 1500), "deep26": (26, 20, 1500), "tokens512": (26, 512, 6000)}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of deep and long graphs."""
    folder = tmp_path_factory.mktemp("large")
    for name, size in SIZES.items():
        sparse_graph(*size).save(folder / f"{name}.safetensors")
    with pc.serve(folder, port=0) as server:
        yield server.address


def require_legible(page: Page, names: bool = True, smallest: float = SMALLEST_NODE) -> dict[str, list[float]]:
    """Fail if a node lies outside the frame or on another, or is too small to see or read. Return the boxes."""
    shown = places(page)
    boxes: dict[str, list[float]] = shown["boxes"]  # type: ignore[assignment]
    width, height = float(shown["width"]), float(shown["height"])  # type: ignore[arg-type]
    for name, (left, top, right, bottom) in boxes.items():
        assert 0 <= left < right <= width and 0 <= top < bottom <= height, f"{name} lies outside"
    entries = sorted(boxes.items(), key=lambda entry: entry[1][0])
    for i, (name, box) in enumerate(entries):
        for other, rival in entries[i + 1 :]:
            if rival[0] >= box[2] - 0.01:
                break
            assert box[3] <= rival[1] + 0.01 or rival[3] <= box[1] + 0.01, f"{name} overlaps {other}"
    assert min(box[2] - box[0] for box in boxes.values()) >= smallest
    if names:
        assert float(shown["scale"]) * FONT >= SMALLEST_TEXT  # type: ignore[arg-type]
        assert all(box[2] - box[0] > box[3] - box[1] for name, box in boxes.items() if name[0].isdigit())
    return boxes


@pytest.mark.parametrize("name", ["deep30", "deep26"])
def test_deep_graph_fits(new_page: Callable[..., Page], large: str, name: str, shot: Callable[..., None]) -> None:
    page = new_page()
    open_graph(page, large, f"g={name}.safetensors")
    first = require_legible(page, names=name == "deep30")
    assert any(node[0].isdigit() for node in first)
    open_graph(page, large, f"g={name}.safetensors&n=0.6&e=0.9")
    wait_until(page, "document.querySelector('.slider output').textContent === '60%'")
    page.wait_for_timeout(400)
    boxes = require_legible(page, names=name == "deep30")
    layers = {int(node.split("/")[0]) for node in boxes if node[0].isdigit()}
    assert len(layers) > 15
    shot(page, name)


def test_many_features_are_dots(new_page: Callable[..., Page], large: str, shot: Callable[..., None]) -> None:
    page = new_page()
    open_graph(page, large, "g=deep30.safetensors&n=0.8&e=0.98")
    boxes = require_legible(page, names=False)
    assert sum(node[0].isdigit() for node in boxes) > 150
    shot(page)


def test_512_tokens(new_page: Callable[..., Page], large: str, shot: Callable[..., None]) -> None:
    page = new_page()
    open_graph(page, large, "g=tokens512.safetensors")
    boxes = require_legible(page, names=False)
    assert 5 <= sum(node.startswith("token/") for node in boxes) < 80  # runs of the others are one column each
    shot(page)
    select(page, "target/0")
    expect(page.get_by_test_id("inputs").get_by_role("listitem").first).to_be_visible()
    page.get_by_label("Nodes: Share of influence").fill("0.7")
    wait_until(page, "Number(document.querySelector('.counts b').textContent.replace(',', '')) > 100")
    page.wait_for_timeout(400)
    drawn(page)
    require_legible(page, names=False, smallest=2.0)
    shot(page, "more")


def test_deep_graph_on_a_phone(new_page: Callable[..., Page], large: str, shot: Callable[..., None]) -> None:
    page = new_page(390, 844, has_touch=True)
    open_graph(page, large, "g=deep30.safetensors&n=0.6&e=0.9&hide=errors")
    require_legible(page, names=False)
    shot(page)
