"""Card, interventions, comparison and traces."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_steps import drawn, open_graph, pin, places, select, wait_until
from playwright.sync_api import Page, expect

import pycircuit as pc
from pycircuit.graph.identifiers import identifiers
from pycircuit.progress import Report
from pycircuit.trace import attribute


def test_feature_card(page: Page, shot: Callable[..., None]) -> None:
    select(page, "0/7/20")
    card = page.get_by_test_id("card")
    expect(card.get_by_role("heading", name="In this prompt")).to_be_visible()
    expect(card.locator("mark").first).to_contain_text("Dallas")
    expect(card.get_by_role("heading", name="Tokens it promotes")).to_be_visible()
    shot(page)


def test_intervene(page: Page, shot: Callable[..., None]) -> None:
    pin(page, "2/8/290", "1/8/407", "0/7/20")
    page.get_by_role("tab", name="Intervene").click()
    panel = page.get_by_test_id("intervene")
    panel.get_by_role("button", name="Texas 0/7/20").click()
    panel.get_by_label("Change of").select_option("scale by")
    panel.get_by_label("Amount").fill("-1")
    panel.get_by_label("Tokens to generate").fill("2")
    panel.get_by_role("button", name="Run").click()
    outcome = page.get_by_test_id("outcome")
    expect(outcome).to_be_visible(timeout=30_000)
    expect(outcome.get_by_text("Austin").first).to_be_visible()
    expect(outcome.locator("table.changes tbody tr")).to_have_count(4)  # the pinned nodes and the target
    expect(outcome.get_by_role("img", name="Predicted against measured changes")).to_be_visible()
    expect(outcome.locator(".texts dd")).to_have_count(2)
    numbers = outcome.locator(".probabilities tr", has_text="Austin").locator("td.number").all_inner_texts()
    before, after = (float(text.strip("<%")) for text in numbers)
    assert before > 90 > after
    shot(page)


def test_compare(page: Page, graphs: dict[str, pc.Graph], shot: Callable[..., None]) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Graph to compare with").select_option("oakland.safetensors")
    panel = page.get_by_test_id("compare")
    expect(panel.get_by_test_id("both").get_by_role("listitem").first).to_be_visible(timeout=20_000)
    assert "with=oakland.safetensors" in page.url
    numbers = {}
    for name in ("Only in A", "In both", "Only in B"):
        numbers[name] = int(re.findall(r"\d+", panel.get_by_role("tab", name=name).inner_text())[-1])
    assert min(numbers.values()) > 0
    other = page.get_by_test_id("other-graph")
    expect(other).to_contain_text("containing Oakland is")
    expect(other.get_by_test_id("graph")).to_have_attribute("aria-label", re.compile("Oakland"))
    page.wait_for_timeout(400)
    shot(page)
    marked = places(page)["own"]
    difference = pc.compare(graphs["dallas"], graphs["oakland"])
    only = {next(iter(page_ids(graphs["dallas"], node.a))) for node in difference.only_a}
    assert marked and set(marked) == only & set(places(page)["boxes"])  # type: ignore[call-overload]
    assert places(page, 1)["own"]
    panel.get_by_role("tab", name="Only in B").click()
    panel.get_by_role("listitem").first.click()
    expect(page.locator("header.bar .prompt")).to_contain_text("Oakland")


def test_compare_two_models(
    new_page: Callable[..., Page], graphs: dict[str, pc.Graph], tmp_path: Path, shot: Callable[..., None]
) -> None:
    """One prompt through two sets of transcoders, beside each other, aligned by label."""
    graphs["dallas"].save(tmp_path / "cross-layer.safetensors")
    prompt = "the capital of the state containing Dallas is"
    per_layer = pc.attribute(pc.load("demo", "plt"), prompt, progress=False)
    per_layer.save(tmp_path / "per-layer.safetensors")
    with pc.serve(tmp_path, port=0) as server:
        page = new_page()
        open_graph(page, server.address, "g=cross-layer.safetensors")
        page.get_by_role("tab", name="Compare").click()
        page.get_by_label("Which nodes are the same").select_option("label")
        page.get_by_label("Graph to compare with").select_option("per-layer.safetensors")
        panel = page.get_by_test_id("compare")
        expect(panel.get_by_test_id("both").get_by_role("listitem").first).to_be_visible(timeout=20_000)
        assert "align=label" in page.url
        expect(panel.get_by_test_id("both")).to_contain_text("Texas")
        expect(page.get_by_test_id("other-graph")).to_contain_text("containing Dallas is")
        page.wait_for_timeout(400)
        shot(page)
        shared = pc.compare(graphs["dallas"], per_layer, align="label")
        for name, nodes in (("Only in A", shared.only_a), ("In both", shared.both), ("Only in B", shared.only_b)):
            assert panel.get_by_role("tab", name=name).inner_text().split()[-1] == str(len(nodes))


def page_ids(graph: pc.Graph, nodes: tuple[int, ...]) -> list[str]:
    return list(identifiers(graph, nodes))


def test_compare_after_an_intervention(page: Page, shot: Callable[..., None]) -> None:
    select(page, "0/7/20")
    page.get_by_role("tab", name="Intervene").click()
    panel = page.get_by_test_id("intervene")
    panel.get_by_role("button", name="Texas 0/7/20").click()
    panel.get_by_role("button", name="Trace and compare").click()
    compared = page.get_by_test_id("compare")
    expect(compared.get_by_role("tab", name="Only in A")).to_be_visible(timeout=60_000)
    assert "with=dallas" in page.url and "after" in page.url
    expect(page.get_by_test_id("other-graph").get_by_test_id("graph")).to_have_attribute(
        "aria-label", re.compile("Dallas")
    )
    wait_until(page, "document.querySelectorAll('.graph-frame').length === 2")
    page.wait_for_timeout(600)
    assert "0/7/20" in places(page)["own"]  # type: ignore[operator]
    assert "0/7/20" not in places(page, 1)["boxes"]  # type: ignore[operator]
    shot(page)


def test_progress_and_cancelling_of_a_trace(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the trace takes longer, as that of a large model does."""

    def slow_attribute(model: pc.ReplacementModel, prompt: str, progress: Report, **options: Any) -> pc.Graph:
        def slow(phase: str, done: int, total: int) -> None:
            progress(phase, done, total)
            time.sleep(0.5)

        return attribute(model, prompt, progress=slow, **options)

    monkeypatch.setattr("pycircuit.page.traces.attribute", slow_attribute)
    before = len(page.get_by_label("Graph", exact=True).get_by_role("option").all())
    page.get_by_role("tab", name="Trace").click()
    panel = page.get_by_test_id("trace")
    panel.get_by_label("Prompt").fill("the capital of the state containing Houston is")
    panel.get_by_role("button", name="Trace").click()
    bar = panel.get_by_role("progressbar", name="Progress")
    expect(bar).to_be_visible()
    wait_until(page, "document.querySelector('progress')?.hasAttribute('value')")
    assert 0 <= float(bar.get_attribute("value") or 2) <= 1
    panel.get_by_role("button", name="Cancel").click()
    expect(page.locator(".notices")).to_contain_text("Cancelled")
    expect(bar).to_have_count(0)
    page.reload()
    drawn(page)
    assert len(page.get_by_label("Graph", exact=True).get_by_role("option").all()) == before


def test_trace(page: Page, shot: Callable[..., None]) -> None:
    page.get_by_role("tab", name="Trace").click()
    panel = page.get_by_test_id("trace")
    panel.get_by_label("Prompt").fill("the capital of the state containing Chicago is")
    expect(panel.get_by_test_id("estimate")).to_contain_text(re.compile(r"\d"), timeout=20_000)
    shot(page)
    panel.get_by_role("button", name="Trace").click()
    expect(page.locator("header.bar .prompt")).to_contain_text("Chicago", timeout=60_000)
