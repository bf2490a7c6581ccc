"""Steps that the tests of the page share."""

from __future__ import annotations

import time

from playwright.sync_api import Locator, Page, expect

PATIENCE = 20.0  # seconds


def wait_until(page: Page, expression: str) -> None:
    """Wait until an expression is true on the page, whose policy forbids Playwright's own wait_for_function."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def open_graph(page: Page, address: str, fragment: str = "g=dallas.safetensors") -> None:
    page.goto(f"{address}#{fragment}")
    drawn(page)


def drawn(page: Page) -> None:
    """Wait until the graph is drawn completely."""
    wait_until(page, "performance.getEntriesByName('pycircuit-complete').length > 0")


def select(page: Page, identifier: str) -> None:
    deadline = time.monotonic() + PATIENCE
    page.keyboard.press("/")
    while not page.evaluate("document.activeElement.matches('.search input')"):  # the page listens once it has drawn
        assert time.monotonic() < deadline, "the search has no focus"
        page.wait_for_timeout(50)
        page.keyboard.press("/")
    page.keyboard.type(identifier)
    expect(page.locator(".results").get_by_role("option").first).to_contain_text(identifier)
    page.keyboard.press("Enter")
    expect(page.locator(".heading .mono")).to_have_text(identifier)


def pin(page: Page, *identifiers: str) -> None:
    for identifier in identifiers:
        select(page, identifier)
        page.keyboard.press("p")
        expect(box(page, identifier)).to_be_visible()


def box(page: Page, identifier: str) -> Locator:
    return page.locator(f'[data-box="{identifier}"]')


def saved(page: Page) -> dict[str, object]:
    """The edits that the server has."""
    page.wait_for_timeout(250)
    reply: dict[str, dict[str, object]] = page.evaluate(
        "async () => (await fetch('api/graphs/dallas.safetensors/edits')).json()"
    )
    return reply["document"]


def drag(page: Page, source: Locator, x: float, y: float) -> None:
    start = source.bounding_box()
    assert start is not None
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(x, y, steps=6)
    page.mouse.up()


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < 100 * share < 1 else f"{100 * share:.0f}%"


def places(page: Page, drawing: int = 0) -> dict[str, object]:
    """Scale of a drawing, the box (left, top, right, bottom) of every node in it, in pixels, and the ringed nodes."""
    reply: dict[str, object] = page.evaluate(
        """(drawing) => {
          const event = new CustomEvent("pycircuit-places", { detail: {} });
          const frame = document.querySelectorAll(".graph-frame")[drawing];
          frame.dispatchEvent(event);
          return { ...event.detail, width: frame.clientWidth, height: frame.clientHeight };
        }""",
        drawing,
    )
    return reply
