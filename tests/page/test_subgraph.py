"""The subgraph: pin, group, name, collapse, drag, edits that are undone, kept and reloaded."""

from __future__ import annotations

import re
from collections.abc import Callable

from page_steps import box, drag, drawn, percent, pin, saved, select
from playwright.sync_api import Page, expect

import pycircuit as pc

FEATURES = ["0/7/20", "1/8/407", "2/8/290"]


def test_pin(page: Page, graphs: dict[str, pc.Graph], shot: Callable[..., None]) -> None:
    pin(page, *FEATURES, "target/0")
    assert saved(page)["pins"] == [*FEATURES, "target/0"]
    scores = page.get_by_test_id("scores")
    graph = graphs["dallas"]
    nodes = [graph.feature_node(*map(int, name.split("/"))) for name in FEATURES]
    expected = graph.subgraph_scores([*nodes, graph.target_node()])
    expect(scores).to_contain_text(percent(expected.replacement))
    expect(scores).to_contain_text(percent(expected.completeness))
    shot(page)
    page.keyboard.press("p")
    expect(box(page, "target/0")).to_have_count(0)


def test_group(page: Page, graphs: dict[str, pc.Graph], shot: Callable[..., None]) -> None:
    pin(page, "target/0")
    for identifier in FEATURES[:2]:
        select(page, identifier)
        page.keyboard.press("x")
    page.keyboard.press("g")
    group = page.locator(".box.group")
    expect(group).to_have_count(1)
    group.click()
    page.get_by_label("Name of the group").fill("Lone Star")
    page.get_by_label("Name of the group").press("Enter")
    expect(box(page, "Lone Star")).to_be_visible()
    box(page, "Lone Star").hover()
    graph = graphs["dallas"]
    column, weight = graph.rows.row(graph.row_node.tolist().index(graph.target_node()))
    nodes = [graph.feature_node(*map(int, name.split("/"))) for name in FEATURES[:2]]
    summed = sum(float(weight[(column == node).nonzero()[0, 0]]) for node in nodes)
    expect(page.locator(".edge-share")).to_have_text(percent(abs(summed) / float(weight.abs().sum())))
    shot(page)
    box(page, "Lone Star").click()
    page.get_by_role("button", name="Expand").click()
    expect(box(page, FEATURES[0])).to_be_visible()
    page.get_by_role("button", name="Collapse").click()
    page.get_by_role("button", name="Ungroup").click()
    assert saved(page)["groups"] == []


def test_group_by_dragging(page: Page) -> None:
    pin(page, *FEATURES)
    over = box(page, FEATURES[0]).bounding_box()
    assert over is not None
    drag(page, box(page, FEATURES[1]), over["x"] + over["width"] / 2, over["y"] + over["height"] / 2)
    expect(page.locator(".box.group")).to_have_count(1)
    (group,) = saved(page)["groups"]
    assert sorted(group["nodes"]) == FEATURES[:2] and group["collapsed"] is True


def test_layout_is_kept(page: Page) -> None:
    pin(page, *FEATURES[:2])
    frame = page.locator(".subgraph-frame").bounding_box()
    assert frame is not None
    drag(page, box(page, FEATURES[0]), frame["x"] + 120, frame["y"] + 60)
    assert list(saved(page)["layout"]) == [FEATURES[0]]
    before = box(page, FEATURES[0]).get_attribute("transform")
    page.reload()
    drawn(page)
    expect(box(page, FEATURES[0])).to_have_attribute("transform", re.compile(re.escape(str(before))))


def test_edit(page: Page) -> None:
    select(page, FEATURES[0])
    page.keyboard.press("r")
    page.get_by_label("Label", exact=True).fill("the state of Texas")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("node-panel").get_by_role("heading", level=2)).to_have_text("the state of Texas")
    assert saved(page)["labels"] == {"0/20": "the state of Texas"}


def test_undo(page: Page) -> None:
    pin(page, *FEATURES)
    page.keyboard.press("z")
    expect(box(page, FEATURES[2])).to_have_count(0)
    page.keyboard.press("z")
    expect(box(page, FEATURES[1])).to_have_count(0)
    page.keyboard.press("Shift+Z")
    expect(box(page, FEATURES[1])).to_be_visible()
    assert saved(page)["pins"] == FEATURES[:2]


def test_reload(page: Page) -> None:
    pin(page, *FEATURES)
    saved(page)
    page.reload()
    drawn(page)
    for identifier in FEATURES:
        expect(box(page, identifier)).to_be_visible()
    expect(page.get_by_role("button", name="Undo")).to_be_enabled()


def test_group_for_me(page: Page, shot: Callable[..., None]) -> None:
    page.keyboard.press("f")
    expect(page.locator(".box.group").first).to_be_visible()
    assert len(saved(page)["groups"]) >= 2
    expect(page.locator(".notice")).to_have_count(0)  # which would cover a part of the picture
    shot(page)
