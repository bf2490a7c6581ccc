"""Graphs of many prompts, and threads that share a model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc
from pycircuit.training.evaluate import replaced_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_many_prompts_in_order(workers: int | None) -> None:
    model, threads = replacement("llama", "plt", torch.float32), torch.get_num_threads()
    prompts = [builders.prompt(n) for n in (9, 4, 13, 6, 11)]
    graphs = list(pc.attribute_many(model, prompts, workers=workers, max_features=10, progress=False))
    assert torch.get_num_threads() == threads
    for prompt, graph in zip(prompts, graphs, strict=True):
        alone = pc.attribute(model, prompt, max_features=10, progress=False)
        assert graph.tokens.ids.tolist() == list(prompt) and torch.equal(graph.row_node, alone.row_node)
        torch.testing.assert_close(graph.dense(), alone.dense(), rtol=1e-5, atol=1e-5)


def test_many_prompts_run_the_chosen_implementation_and_can_be_closed() -> None:
    model = replacement("llama", "plt", torch.float64)
    with pc.use("reference"):
        graphs = pc.attribute_many(model, [builders.prompt(5)] * 6, max_features=3, progress=False)
        assert next(graphs).certificate < 1e-10
    graphs.close()  # type: ignore[attr-defined]


def test_threads_share_one_model_through_several_objects() -> None:
    """Hooks see every forward of the model, so only one may run, even through several objects."""
    first = replacement("llama", "plt", torch.float32)
    second = pc.ReplacementModel(first.hf_model, first.transcoders)
    assert first.forward_lock is second.forward_lock
    prompts = [torch.as_tensor(builders.prompt()).roll(n) for n in range(4)]
    expected = [(first.freeze(p).errors, replaced_logits(first, p[None])) for p in prompts]

    def run(n: int) -> bool:
        model, (errors, logits) = (first, second)[n % 2], expected[n % 4]
        if n % 3:
            return torch.equal(model.freeze(prompts[n % 4]).errors, errors)
        return torch.equal(replaced_logits(model, prompts[n % 4][None]), logits)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(60)))


def test_many_prompts_are_checked_first() -> None:
    model = replacement("llama", "plt", torch.float32)
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt must hold ids from 0 to 60, got 61"):
        pc.attribute_many(model, [[1, 2], [3, 61]])
    with pytest.raises(TypeError, match="list of prompts"):
        pc.attribute_many(model, "text")
    with pytest.raises(ValueError, match="workers must be an int of at least 1, got 0"):
        pc.attribute_many(model, [[1, 2]], workers=0)
    assert list(pc.attribute_many(model, [])) == []
