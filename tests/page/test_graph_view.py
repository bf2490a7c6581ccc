"""The graph: open, hover, select, prune, search, paths, zoom, links."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from page_steps import drawn, open_graph, wait_until
from playwright.sync_api import Page, expect

import pycircuit as pc


def counts(page: Page) -> tuple[int, int]:
    """(features, edges) that the graph shows."""
    text = page.get_by_test_id("counts").inner_text()
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", text)]
    return numbers[0], numbers[2]


def search_for(page: Page, text: str) -> None:
    """Select the best match of a search."""
    page.keyboard.press("/")
    page.keyboard.type(text)
    expect(page.locator(".results").get_by_role("option").first).to_be_visible()
    page.keyboard.press("Enter")


def sweep(page: Page, steps: int = 40) -> str | None:
    """Move the pointer over the graph until something is hovered: text of its tooltip."""
    box = page.get_by_test_id("graph").bounding_box()
    assert box is not None
    for row in range(1, steps):
        for column in range(1, steps):
            page.mouse.move(box["x"] + box["width"] * column / steps, box["y"] + box["height"] * row / steps)
            if page.get_by_role("tooltip").count():
                return page.get_by_role("tooltip").inner_text()
    return None


def test_open(page: Page, graphs: dict[str, pc.Graph], shot: Callable[..., None]) -> None:
    pruned = graphs["dallas"].prune()
    features = int(pruned.node_mask[: graphs["dallas"].first_error].sum())
    assert counts(page) == (features, int(pruned.edge_mask.sum()))
    expect(page.locator("header.bar .prompt")).to_contain_text("containing Dallas is")
    shot(page)


def test_hover(page: Page, shot: Callable[..., None]) -> None:
    text = sweep(page)
    assert text is not None and "Austin" in text and "target/0" in text  # the uppermost node
    expect(page.locator(".graph-frame.dimmed")).to_be_visible()
    shot(page)


def test_click_selects(page: Page, graphs: dict[str, pc.Graph], shot: Callable[..., None]) -> None:
    assert sweep(page) is not None
    page.mouse.down()
    page.mouse.up()
    expect(page.get_by_test_id("node-panel").get_by_role("heading", level=2)).to_have_text("Austin")
    graph = graphs["dallas"]
    column, weight = graph.rows.row(graph.row_node.tolist().index(graph.target_node()))
    share = weight.abs() / weight.abs().sum()
    strongest = graph.features[column[share.argmax()]].tolist()
    first = page.get_by_test_id("inputs").get_by_role("listitem").first
    expect(first).to_contain_text("/".join(map(str, strongest)))
    expect(first).to_contain_text(f"{100 * float(share.max()):.0f}%")
    shot(page)


def test_prune(page: Page, graphs: dict[str, pc.Graph]) -> None:
    before = counts(page)
    page.get_by_label("Nodes: Share of influence").fill("0.4")
    page.get_by_label("Edges: Share of influence").fill("0.8")
    pruned = graphs["dallas"].prune(0.4, 0.8)
    expected = int(pruned.node_mask[: graphs["dallas"].first_error].sum())
    expect(page.get_by_test_id("counts").locator("b").first).to_have_text(str(expected))
    assert counts(page) == (expected, int(pruned.edge_mask.sum())) and counts(page) < before


def test_toggles(page: Page) -> None:
    search_for(page, "target/0")
    rows = page.get_by_test_id("inputs").get_by_role("listitem")
    expect(rows.filter(has_text="error/").first).to_be_visible()
    page.get_by_role("button", name="Errors").click()
    expect(rows.filter(has_text="error/")).to_have_count(0)
    page.get_by_role("button", name="Lower").click()
    expect(page.locator(".line.negative")).to_have_count(0)
    assert "hide=errors,negative" in page.url


def test_density(new_page: Callable[..., Page], graphs: dict[str, pc.Graph], tmp_path: Path) -> None:
    """The slider hides features that are active on too many tokens, where that is known."""
    graphs["dallas"].save(tmp_path / "dallas.safetensors")
    prompt = "the capital of the state containing Dallas is"
    pc.write_examples(pc.load("demo"), [prompt] * 2, tmp_path, features=[(0, 20), (2, 290)], progress=False)
    with pc.serve(tmp_path, port=0) as server:
        page = new_page()
        open_graph(page, server.address)
        before, _ = counts(page)
        page.get_by_role("slider", name="Density").fill("0.05")
        wait_until(page, f"!document.querySelector('[data-testid=counts]').innerText.startsWith('{before} ')")
        assert counts(page)[0] == before - 2
        assert "density=0.05" in page.url


def test_search(page: Page, shot: Callable[..., None]) -> None:
    page.keyboard.press("/")
    page.keyboard.type("texas")
    options = page.locator(".results").get_by_role("option")
    expect(options.first).to_contain_text("Texas")
    shot(page)
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("node-panel").get_by_role("heading", level=2)).to_have_text("Texas")
    search_for(page, "0/20")
    expect(page.locator(".heading .mono")).to_have_text("0/7/20")


def test_strongest_paths(page: Page, graphs: dict[str, pc.Graph], shot: Callable[..., None]) -> None:
    search_for(page, "dallas")
    page.get_by_role("button", name="Paths from").click()
    search_for(page, "target/0")
    page.get_by_role("button", name="Paths to").click()
    graph = graphs["dallas"]
    best = graph.paths(graph.token_node(7), graph.target_node(), 5)
    expect(page.get_by_test_id("paths").get_by_role("listitem")).to_have_count(len(best))
    expect(page.get_by_test_id("paths").get_by_role("listitem").first).to_contain_text("Dallas")
    shot(page)
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("paths")).to_have_count(0)


def test_zoom_and_pan(page: Page) -> None:
    box = page.get_by_test_id("graph").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 300, box["y"] + 250)
    page.mouse.wheel(0, -400)
    wait_until(page, "location.hash.includes('at=')")
    zoomed = page.url
    page.mouse.down()
    page.mouse.move(box["x"] + 380, box["y"] + 200, steps=4)
    page.mouse.up()
    wait_until(page, f"location.href !== {zoomed!r}")
    page.keyboard.press("0")
    wait_until(page, "!location.hash.includes('at=')")


def test_share_a_link(page: Page, new_page: Callable[..., Page]) -> None:
    search_for(page, "0/20")
    page.get_by_label("Nodes: Share of influence").fill("0.6")
    page.get_by_role("button", name="Tokens").click()
    wait_until(page, "location.hash.includes('n=0.6')")
    shown = counts(page)
    other = new_page()
    other.goto(page.url)
    drawn(other)
    expect(other.locator(".heading .mono")).to_have_text("0/7/20")
    expect(other.get_by_role("button", name="Tokens")).to_have_attribute("aria-pressed", "false")
    page.wait_for_timeout(300)
    assert counts(other) == counts(page) and counts(page) <= shown


def test_dark(new_page: Callable[..., Page], address: str, shot: Callable[..., None]) -> None:
    page = new_page(color_scheme="dark")
    open_graph(page, address)
    ground = page.evaluate("getComputedStyle(document.querySelector('.page')).backgroundColor")
    assert max(int(number) for number in re.findall(r"\d+", ground)[:3]) < 60
    shot(page)
    page.keyboard.press("d")
    assert page.locator(".page").get_attribute("data-theme") == "light"
