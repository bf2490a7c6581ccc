"""Export, import, a narrow screen, the keyboard alone, accessible names, and the page without a server."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from page_steps import box, drawn, open_graph, pin, places, saved, select
from playwright.sync_api import Page, expect

import pycircuit as pc

SVG = "{http://www.w3.org/2000/svg}"


def exported(page: Page, name: str) -> bytes:
    """Content of the file that an entry of the export menu downloads."""
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name=name).click()
    return Path(download.value.path()).read_bytes()


def test_export_svg(page: Page) -> None:
    root = ElementTree.fromstring(exported(page, "Graph as SVG"))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"Texas", "Dallas", "Austin 99%", "output", "tokens"} <= set(texts)
    assert len(list(root.iter(f"{SVG}path"))) > 40


def test_export_subgraph_svg(page: Page) -> None:
    pin(page, "0/7/20", "target/0")
    root = ElementTree.fromstring(exported(page, "Subgraph as SVG"))
    assert {"Texas", "Austin 99%"} <= {element.text for element in root.iter(f"{SVG}text")}


def test_export_png(page: Page) -> None:
    png = exported(page, "Graph as PNG")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1500 and height > 900


def test_export_json(page: Page) -> None:
    pin(page, "0/7/20", "1/8/407")
    saved(page)
    content = json.loads(exported(page, "JSON for Neuronpedia"))
    assert content["metadata"]["prompt_tokens"][7].strip() == "Dallas"
    assert len(content["qParams"]["pinnedIds"]) == 2


def test_import(page: Page) -> None:
    content = json.loads(exported(page, "JSON for circuit-tracer"))
    pinned = next(node["node_id"] for node in content["nodes"] if node["feature_type"] == "cross layer transcoder")
    page.get_by_role("button", name="Export").click()
    page.get_by_role("menuitem", name="Import a link").click()
    page.get_by_label("Link", exact=True).fill(f"http://localhost:8041/index.html?slug=dallas&pinnedIds={pinned}")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".subgraph-svg .box")).to_have_count(1)
    assert len(saved(page)["pins"]) == 1


def test_narrow_screen(new_page: Callable[..., Page], address: str, page: Page, shot: Callable[..., None]) -> None:
    pin(page, "0/7/20", "target/0")
    saved(page)
    phone = new_page(390, 844, has_touch=True)
    open_graph(phone, address, "g=dallas.safetensors&s=0/7/20")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    expect(phone.get_by_test_id("node-panel")).to_be_visible()
    shot(phone)
    phone.get_by_role("tab", name="Subgraph").tap()
    expect(box(phone, "0/7/20")).to_be_visible()
    shot(phone, "subgraph")


def touch(page: Page, *steps: list[tuple[float, float]]) -> None:
    """Move fingers over the page: each step has the place of every finger."""
    session = page.context.new_cdp_session(page)
    for i, fingers in enumerate(steps):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(fingers)]
        session.send("Input.dispatchTouchEvent", {"type": "touchMove" if i else "touchStart", "touchPoints": points})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_drag_and_pinch_on_a_phone(new_page: Callable[..., Page], address: str) -> None:
    phone = new_page(390, 844, has_touch=True)
    open_graph(phone, address)
    frame = phone.get_by_test_id("graph").bounding_box()
    assert frame is not None
    x, y = frame["x"] + 200, frame["y"] + 120
    first = places(phone)
    left, top, *_ = first["boxes"]["target/0"]  # type: ignore[index]
    touch(phone, [(x, y)], [(x - 30, y + 20)], [(x - 60, y + 45)])
    moved = places(phone)
    assert moved["boxes"]["target/0"][:2] == pytest.approx([left - 60, top + 45], abs=1)  # type: ignore[index]
    assert moved["scale"] == first["scale"]
    touch(phone, [(x - 20, y), (x + 20, y)], [(x - 30, y), (x + 30, y)], [(x - 40, y), (x + 40, y)])
    pinched = places(phone)
    assert pinched["scale"] == pytest.approx(2 * float(moved["scale"]), rel=0.01)  # type: ignore[arg-type]
    centre = (x - frame["x"], y - frame["y"])  # of the fingers, which stays where it is
    expected = [2 * place - middle for place, middle in zip((left - 60, top + 45), centre, strict=True)]
    assert pinched["boxes"]["target/0"][:2] == pytest.approx(expected, abs=3)  # type: ignore[index]
    assert phone.evaluate("[scrollX, scrollY, visualViewport.scale]") == [0, 0, 1]


def test_keyboard_only(page: Page, shot: Callable[..., None]) -> None:
    keys = [
        "ArrowDown",
        "p",
        "ArrowDown",
        "p",
        "ArrowDown",
        "p",
        "x",
        "ArrowUp",
        "x",
        "g",
        "2",
        "1",
        "e",
        ",",
        "d",
        "d",
    ]
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(80)
    document = saved(page)
    (group,) = document["groups"]
    assert len(group["nodes"]) == 2 and set(group["nodes"]) < set(document["pins"])
    assert len(document["pins"]) in (3, 4)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    shot(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("l")
    expect(page.get_by_role("dialog").get_by_role("row").nth(1)).to_be_visible()
    shot(page, "list")


def test_controls_have_names(page: Page) -> None:
    select(page, "0/7/20")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [role=button], [tabindex]")]
          .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
          .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []


def test_file_by_itself(
    new_page: Callable[..., Page], graphs: dict[str, pc.Graph], tmp_path: Path, shot: Callable[..., None]
) -> None:
    path = tmp_path / "g.html"
    graphs["dallas"].to_html(path)
    page = new_page()
    page.goto(path.as_uri())
    drawn(page)
    select(page, "0/7/20")
    page.keyboard.press("p")
    expect(box(page, "0/7/20")).to_be_visible()
    expect(page.get_by_role("tab", name="Intervene")).to_have_count(0)
    features = page.get_by_test_id("counts").locator("b").first
    before = int(features.inner_text())
    page.get_by_label("Nodes: Share of influence").fill("0.3")
    expect(features).not_to_have_text(str(before))
    page.keyboard.press("z")
    expect(box(page, "0/7/20")).to_have_count(0)
    shot(page)


def test_texts_cannot_break_out_of_a_file(
    new_page: Callable[..., Page], graphs: dict[str, pc.Graph], tmp_path: Path
) -> None:
    hostile = pc.Graph.load(saved_copy(graphs["dallas"], tmp_path))
    hostile.labels[0, 20] = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    hostile.to_html(tmp_path / "hostile.html")
    page = new_page()
    page.goto((tmp_path / "hostile.html").as_uri())
    drawn(page)
    select(page, "0/7/20")
    assert page.evaluate("window.broken") is None


def saved_copy(graph: pc.Graph, folder: Path) -> Path:
    graph.save(folder / "copy.safetensors")
    return folder / "copy.safetensors"


def test_notebook(graphs: dict[str, pc.Graph], new_page: Callable[..., Page], shot: Callable[..., None]) -> None:
    """The widget's script draws from the widget's data, as anywidget runs it."""
    widget = graphs["dallas"].show()
    page = new_page(1000, 800)
    page.goto("about:blank")
    page.set_content("<div id='cell'></div>")
    page.add_style_tag(content=widget._css)
    page.evaluate(
        """async ([script, data]) => {
          const code = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
          const { default: widget } = await import(code);
          widget.render({ model: { get: () => data }, el: document.getElementById("cell") });
        }""",
        [widget._esm, widget.data],
    )
    drawn(page)
    expect(page.get_by_test_id("counts")).to_contain_text("features")
    shot(page)
    # Keys pressed in the widget are the page's, not the notebook's, where A adds a cell and Z takes one back.
    page.evaluate("window.leaked = []; document.addEventListener('keydown', (event) => window.leaked.push(event.key))")
    page.get_by_test_id("graph").click(position={"x": 5, "y": 5})
    for key in ("a", "z", "?"):
        page.keyboard.press(key)
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate("window.leaked") == []
    assert page.evaluate("document.activeElement.closest('[data-lm-suppress-shortcuts]') !== null")
