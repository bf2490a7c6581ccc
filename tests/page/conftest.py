"""The page in a real Chromium: a server of the demo model, and pages that must stay free of errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import PageWatch, launched
from page_steps import drawn, open_graph
from playwright.sync_api import Browser, Page, expect

import pycircuit as pc

expect.set_options(timeout=20_000)  # a busy machine is slow
ROOT = Path(__file__).parents[2]
PROMPTS = {city.lower(): f"the capital of the state containing {city} is" for city in ("Dallas", "Oakland")}


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pc.Graph]:
    torch.set_num_threads(1)
    model = pc.load("demo")
    return {name: pc.attribute(model, prompt, progress=False) for name, prompt in PROMPTS.items()}


@pytest.fixture(scope="session")
def address(graphs: dict[str, pc.Graph], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the demo model and two graphs."""
    folder = tmp_path_factory.mktemp("graphs")
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.safetensors")
    with pc.serve("demo", folder=folder, port=0) as server:
        yield server.address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opener of pages at 1,440 px, or as asked; each must end without an error and without a foreign request."""
    watches: list[PageWatch] = []

    def opener(width: int = 1440, height: int = 900, **options: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        watches.append(PageWatch(context.new_page()))
        return watches[-1].page

    yield opener
    for watch in watches:
        watch.page.context.close()
        watch.require_quiet()


@pytest.fixture
def page(new_page: Callable[..., Page], address: str) -> Page:
    """The page with the Dallas graph, without edits of other tests."""
    page = new_page()
    open_graph(page, address)
    page.evaluate(
        """async () => {
          const path = "api/graphs/dallas.safetensors/edits";
          const { revision } = await (await fetch(path)).json();
          const document = { labels: {}, pins: [], groups: [], layout: {} };
          const headers = { "X-Pycircuit": "1", "Content-Type": "application/json" };
          await fetch(path, { method: "PUT", headers, body: JSON.stringify({ revision, document }) });
        }"""
    )
    page.reload()
    drawn(page)
    return page


@pytest.fixture
def shot(request: pytest.FixtureRequest) -> Callable[[Page], None]:
    """Keep a picture of a page in build/page-screenshots, named after the test."""

    def keep(page: Page, name: str = "") -> None:
        folder = ROOT / "build" / "page-screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        test_name = request.node.name.removeprefix("test_").split("[")[0]
        page.screenshot(path=folder / f"{test_name}{'-' + name if name else ''}.png")

    return keep
