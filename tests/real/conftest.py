"""SmolLM2-135M-Instruct, which installs as a package, and transcoders for it: random ones, and trained here."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from training import LAYERS, Streams, fit, harvest

import pycircuit as pc
from pycircuit.loading import smollm2

BUILD = Path(__file__).parents[2] / "build"
TRAINED, UNSEEN, WINDOW = 24, 8, 256  # windows of text, and how many tokens each has

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figure() -> Callable[[str], None]:
    """Figures to be read after the run."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def folder() -> Path:
    """Model and tokenizer out of their package as transformers keeps them, dequantised once."""
    try:
        return smollm2(BUILD)
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}; run make test-real")


@pytest.fixture(scope="session")
def load(folder: Path) -> Callable[[torch.dtype], Any]:
    return lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="session")
def hf_model(load: Callable[[torch.dtype], Any]) -> Any:
    return load(torch.float32)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def windows(tokenizer: Any) -> torch.Tensor:
    """English prose that every Python carries, its language reference, in shuffled windows: [windows, tokens]."""
    ids = torch.tensor(tokenizer.encode("\n\n".join(topics.values()), verbose=False))
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="session")
def streams(hf_model: Any, windows: torch.Tensor, figure: Callable[[str], None]) -> tuple[Streams, Streams]:
    """Inputs and outputs of every MLP: on text to train on, and on other text."""
    begin = time.perf_counter()
    both = harvest(hf_model, windows[: TRAINED + UNSEEN])
    figure(f"harvest: {(TRAINED + UNSEEN) * WINDOW} tokens in {time.perf_counter() - begin:.0f} s")
    return both.split(TRAINED * (WINDOW - 1))


@pytest.fixture(scope="session")
def trained(streams: tuple[Streams, Streams], figure: Callable[[str], None]) -> pc.PerLayerTranscoders:
    begin = time.perf_counter()
    transcoders = fit(streams[0])
    seconds = time.perf_counter() - begin
    size, activation = transcoders.size(0), transcoders.activation[0]
    figure(f"training: {transcoders.depth} layers of {size} features, {activation}, in {seconds:.0f} s")
    return transcoders


@pytest.fixture(scope="session")
def texts(windows: torch.Tensor) -> dict[int, list[int]]:
    """Prompts of text that no transcoder has seen, by their length."""
    unused = windows[TRAINED + UNSEEN :].flatten().tolist()
    return {positions: unused[:positions] for positions in (64, 512)}


@pytest.fixture(scope="session")
def at_random(hf_model: Any, texts: dict[int, list[int]]) -> Callable[[int], pc.PerLayerTranscoders]:
    """Random transcoders of 4,096 features, 32 of them active at a position of the prompt of this length."""

    def make(positions: int) -> pc.PerLayerTranscoders:
        size, active, width = 4096, 32, hf_model.config.hidden_size
        g = torch.Generator().manual_seed(1)
        read = harvest(hf_model, torch.tensor([texts[positions]])).read
        w_enc = torch.randn(LAYERS, size, width, generator=g) / width**0.5
        w_dec = torch.randn(LAYERS, size, width, generator=g) / (width * active) ** 0.5
        count = active * read.shape[1]
        theta = torch.stack([(read[n] @ w_enc[n].T).flatten().topk(count).values[-1:] for n in range(LAYERS)])
        rules = pc.JumpReLU(theta.expand(-1, size).contiguous())
        return pc.PerLayerTranscoders(w_enc, torch.zeros(LAYERS, size), w_dec, activation=rules)

    return make
