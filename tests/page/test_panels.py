"""Card, interventions, comparison and traces."""

from __future__ import annotations

import re
from collections.abc import Callable

from page_steps import pin, select
from playwright.sync_api import Page, expect

import pycircuit as pc


def test_feature_card(page: Page, shot: Callable[..., None]) -> None:
    select(page, "0/7/347")
    card = page.get_by_test_id("card")
    expect(card.get_by_role("heading", name="In this prompt")).to_be_visible()
    expect(card.locator("mark").first).to_contain_text("Dallas")
    expect(card.get_by_role("heading", name="Tokens it promotes")).to_be_visible()
    shot(page)


def test_intervene(page: Page, shot: Callable[..., None]) -> None:
    pin(page, "2/8/52", "1/8/377", "0/7/347")
    page.get_by_role("tab", name="Intervene").click()
    panel = page.get_by_test_id("intervene")
    panel.get_by_role("button", name="Texas 0/7/347").click()
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
    before, after = (float(text.rstrip("%")) for text in numbers)
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
    panel.get_by_role("tab", name="Only in B").click()
    panel.get_by_role("listitem").first.click()
    expect(page.locator("header.bar .prompt")).to_contain_text("Oakland")


def test_trace(page: Page, shot: Callable[..., None]) -> None:
    page.get_by_role("tab", name="Trace").click()
    panel = page.get_by_test_id("trace")
    panel.get_by_label("Prompt").fill("the capital of the state containing Chicago is")
    expect(panel.get_by_test_id("estimate")).to_contain_text(re.compile(r"\d"), timeout=20_000)
    shot(page)
    panel.get_by_role("button", name="Trace").click()
    expect(page.locator("header.bar .prompt")).to_contain_text("Chicago", timeout=60_000)
