"""The application runs the model in other threads meanwhile: its numbers and ours, also after an interrupt."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread, get_ident
from types import FrameType
from typing import Any

import builders
import pytest
import torch
from builders import replacement
from torch import Tensor

import pycircuit as pc
from pycircuit.model.attention_choice import use_attention
from pycircuit.training.stream import Source

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, OTHER = builders.prompt(), builders.prompt(11, seed=4)
STEER = [pc.Intervention(0, 3, 5, 2.0)]
# name -> (the other forward starts inside ours, it ends inside ours)
OVERLAPS = {
    "before-inside": (False, True),
    "inside-after": (True, False),
    "before-after": (False, False),
    "inside-inside": (True, True),
}
SECONDS = 60  # a thread that waits longer waits for ever


def graph(model: pc.ReplacementModel) -> list[Tensor]:
    g = pc.attribute(model, PROMPT, max_features=6, progress=False)
    return [g.rows.weight, g.bias, g.values, g.features]


def activations(model: pc.ReplacementModel, prompts: int) -> list[Tensor]:
    return [t for features in model.activations([PROMPT] * prompts) for f in features for t in (f.index, f.value)]


def training_activations(model: pc.ReplacementModel) -> list[Tensor]:
    """Activations as training reads them."""
    source = Source(model.hf_model, model.family, model.weights, "mlp_in", "mlp_out", 1)
    return list(source.activations([PROMPT, PROMPT[:7]]))


# name -> (our run, the number of its forward that meets the other one)
RUNS: dict[str, tuple[Callable[[pc.ReplacementModel], list[Tensor]], int]] = {
    "attribute": (graph, 1),
    "activations": (lambda model: activations(model, 1), 1),
    "activations_together": (lambda model: activations(model, 2), 1),
    "intervene": (lambda model: [pc.intervene(model, PROMPT, STEER).logits], 1),
    "intervene_changed": (lambda model: [pc.intervene(model, PROMPT, STEER, freeze="none").logits], 2),
    "generate": (lambda model: [torch.tensor(pc.generate(model, PROMPT, STEER, max_new_tokens=4))], 2),
    "train": (training_activations, 1),
    "open": (lambda model: graph(pc.ReplacementModel(model.hf_model, model.transcoders)), 2),  # its probe, then a graph
}


def forward(model: Any) -> list[Tensor]:
    """Logits of the application's own forward."""
    with torch.no_grad():
        return [model(input_ids=OTHER[None], use_cache=False).logits]


def same(result: list[Tensor], expected: list[Tensor]) -> bool:
    return len(result) == len(expected) and all(map(torch.equal, result, expected))


class Meeting:
    """A run of ours in this thread and another one in its own thread, which overlap.

    Both stop before the second layer; the other thread's masks exist by then, its attention does not.
    """

    def __init__(self, layer: Any, other: Callable[[], Any], other_layer: Any, overlap: str, turn: int) -> None:
        self.starts_inside, self.ends_inside = OVERLAPS[overlap]
        self.other = other
        self.turn = turn
        self.calls = 0
        self.thread = get_ident()
        self.stopped = Event()
        self.resumed = Event()
        self.pool = ThreadPoolExecutor(1)
        self.future: Future[Any] = Future()
        self.handles = [layer.register_forward_pre_hook(self._ours)]
        self.handles.append(other_layer.register_forward_pre_hook(self._theirs))

    def run(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        try:
            with self.pool:
                if not self.starts_inside:
                    self._start()
                ours = function()
                self.resumed.set()
                return ours, self.future.result(SECONDS)
        finally:
            self.resumed.set()
            for handle in self.handles:
                handle.remove()

    def _start(self) -> None:
        self.future = self.pool.submit(self.other)
        self.future.add_done_callback(lambda _: self.stopped.set())  # it died on the way
        assert self.stopped.wait(SECONDS)

    def _ours(self, *_: Any) -> None:
        if get_ident() != self.thread:
            return
        self.calls += 1
        if self.calls != self.turn:
            return
        if self.starts_inside:
            self._start()
        if self.ends_inside:
            self.resumed.set()
            self.future.exception(SECONDS)

    def _theirs(self, *_: Any) -> None:
        if get_ident() != self.thread:
            self.stopped.set()
            assert self.resumed.wait(SECONDS)


def layers(model: Any) -> list[Any]:
    return list(model.get_submodule(pc.model.families.family_of(model).layers).children())


@pytest.mark.parametrize(("run", "overlap"), [(run, overlap) for run in RUNS for overlap in OVERLAPS if run != "open"])
def test_an_application_runs_the_model_meanwhile(run: str, overlap: str) -> None:
    """Its forward gives exactly its own numbers and ours exactly those of an undisturbed run, however they overlap."""
    model = replacement("mistral", "plt", torch.float32)
    function, turn = RUNS[run]
    expected, own = function(model), forward(model.hf_model)
    layer = layers(model.hf_model)[1]
    ours, theirs = Meeting(layer, lambda: forward(model.hf_model), layer, overlap, turn).run(lambda: function(model))
    assert same(theirs, own)
    assert same(ours, expected)


@pytest.mark.parametrize("name", builders.CONFIGS)
def test_every_family_keeps_its_own_attention_in_other_threads(name: str) -> None:
    model = builders.build(name)
    ours = pc.ReplacementModel(model, replacement("llama", "plt", torch.float32).transcoders)
    expected, layer = activations(ours, 1), layers(model)[1]
    for implementation in {model.config._attn_implementation, "eager"}:
        model.set_attn_implementation(implementation)
        own = forward(model)
        for overlap in ("before-inside", "inside-after"):
            meeting = Meeting(layer, lambda: forward(model), layer, overlap, 1)
            result, theirs = meeting.run(lambda: activations(ours, 1))
            assert same(theirs, own) and same(result, expected), (implementation, overlap)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_two_models_that_share_a_config(overlap: str) -> None:
    """Both are traced at once, and the config says afterwards what it said before."""
    first, second = (replacement("llama", "plt", torch.float32) for _ in range(2))
    with torch.no_grad():
        second.hf_model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    for m in second.hf_model.modules():
        if hasattr(m, "config"):
            m.config = first.hf_model.config
    before = dict(vars(first.hf_model.config))
    expected, other_expected = graph(first), graph(second)
    layer, other_layer = (model.hf_model.model.layers[1] for model in (first, second))
    ours, theirs = Meeting(layer, lambda: graph(second), other_layer, overlap, 1).run(lambda: graph(first))
    assert same(ours, expected) and same(theirs, other_expected)
    assert vars(first.hf_model.config) == before and first.hf_model.config._attn_implementation == "sdpa"


def test_an_application_may_choose_another_attention_meanwhile() -> None:
    """It sees its own choice in its own thread, and the choice stays."""
    model = replacement("llama", "plt", torch.float32)
    config, expected = model.hf_model.config, graph(model)
    implementations = []

    def choose() -> None:
        implementations.append(config._attn_implementation)
        model.hf_model.set_attn_implementation("eager")
        implementations.append(config._attn_implementation)

    def hook(*_: Any) -> None:
        thread = Thread(target=choose)
        thread.start()
        thread.join()

    handle = model.hf_model.model.layers[1].register_forward_pre_hook(hook)
    ours = graph(model)
    handle.remove()
    assert implementations == ["sdpa", "eager"] and config._attn_implementation == "eager"
    assert same(ours, expected)


def test_an_application_thread_that_never_stops() -> None:
    """Forwards that overlap ours anywhere."""
    model, stop = replacement("gemma2", "plt", torch.float32), Event()
    expected, own = graph(model), forward(model.hf_model)
    wrong: list[int] = []

    def serve() -> int:
        count = 0
        while not stop.is_set():
            count += 1
            if not same(forward(model.hf_model), own):
                wrong.append(count)
        return count

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        try:
            ours = [graph(model) for _ in range(10)]
        finally:
            stop.set()
        assert served.result(SECONDS) > 0 and not wrong
    assert all(same(g, expected) for g in ours)


def state(model: Any) -> list[Any]:
    """Everything that a run of ours could leave on a model: hooks and config values."""
    hooks = [
        (m._forward_hooks, m._forward_hooks_with_kwargs, m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs)
        for m in model.modules()
    ]
    configs = [dict(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return [[tuple(map(dict, dicts)) for dicts in hooks], configs, implementations]


Step = tuple[str, int, str]  # file, line, event


class Interrupted:
    """A run that is interrupted at a step in some files, the last time that it comes by.

    Steps are calls and lines. The end of a `with` is none: Python lets no signal in before its `__exit__`.
    """

    def __init__(self, function: Callable[[], Any], files: tuple[str, ...]) -> None:
        self.files = tuple(str(Path(pc.model.__file__).with_name(name)) for name in files)
        self.function = function
        self.step: Step | None = None
        self.turn = 0
        self.turns: dict[Step, int] = {}

    def run(self, step: Step | None = None, turn: int = 0) -> dict[Step, int]:
        """Run, interrupted at a step unless None, and return every step with the number of its turns."""
        self.step, self.turn, self.turns = step, turn, {}
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            self.function()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return self.turns

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.endswith(self.files) or frame.f_code.co_name in ("__del__", "<genexpr>"):
            return None  # Python drops an error in __del__, or in a generator that it closes
        step = (name, frame.f_lineno, event)
        if event in ("call", "line") and not linecache.getline(*step[:2]).lstrip().startswith("with "):
            self.turns[step] = self.turns.get(step, 0) + 1
            if step == self.step and self.turns[step] == self.turn:
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize(
    ("run", "files"),
    [
        ("activations", ("capture.py", "hooks.py", "attention_choice.py", "causal_attention.py")),
        ("generate", ("transcoder_hooks.py",)),
    ],
)
def test_an_interrupt_at_any_line_leaves_nothing(run: str, files: tuple[str, ...]) -> None:
    """Hooks, configs and the lock are as before, whichever line it falls on, those that clean up included."""
    model = replacement("llama", "plt", torch.float32)
    function, _ = RUNS[run]
    expected, own, before = function(model), forward(model.hf_model), state(model.hf_model)
    interrupted = Interrupted(lambda: function(model), files)
    steps = interrupted.run()
    assert len(steps) > 30
    for step, turn in steps.items():
        interrupted.run(step, turn)
        assert state(model.hf_model) == before, step
    assert same(forward(model.hf_model), own)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(model.forward_lock.acquire, timeout=1).result()
        other.submit(model.forward_lock.release).result()
    assert same(function(model), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("run", RUNS)
def test_an_error_in_the_forward_leaves_nothing(run: str, error: type[BaseException]) -> None:
    model = replacement("gemma3", "plt", torch.float32)
    function, turn = RUNS[run]
    before = state(model.hf_model)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == turn:
            raise error

    handle = layers(model.hf_model)[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        function(model)
    handle.remove()
    assert state(model.hf_model) == before


def test_a_choice_of_this_thread_is_not_seen_in_others() -> None:
    model = builders.build("gemma3")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    with ThreadPoolExecutor(1) as other, use_attention(model, "eager"):
        assert {config._attn_implementation for config in configs} == {"eager"}
        in_other = other.submit(lambda: {config._attn_implementation for config in configs}).result()
    assert in_other == {config._attn_implementation for config in configs} == {"sdpa"}


def test_compiled_layers_are_traced_as_they_are() -> None:
    """A compiled layer serves every thread alike, so a trace runs the layer itself."""
    model = replacement("llama", "plt", torch.float32)
    inner = model.hf_model.model
    expected = graph(model)
    inner.layers[0].compile(backend="eager")
    inner.layers[1] = torch.compile(inner.layers[1], backend="eager")
    compiled = [inner.layers[0]._compiled_call_impl, vars(inner.layers[1])["forward"]]
    assert same(graph(model), expected)
    assert [inner.layers[0]._compiled_call_impl, vars(inner.layers[1])["forward"]] == compiled


def bypass_hooks(model: Any, name: str) -> None:
    """Have the MLP or a norm of the second layer called in a way that no hook sees."""
    layer = model.model.layers[1]
    owner = layer.get_submodule(name)
    layer._modules[name] = Unhooked(owner)


class Unhooked(torch.nn.Module):
    """A module that calls another one's forward, not the module."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("run", "name", "message"),
    [
        ("attribute", "mlp", r"no mlp_in in layers \[1\]"),
        ("attribute", "input_layernorm", r"no attention_norm in layers \[1\]"),
        ("activations", "mlp", r"no mlp_in in layers \[1\]"),
        ("activations_together", "mlp", r"no mlp_in in layers \[1\]"),
        ("intervene", "mlp", r"no mlp_in in layers \[1\]"),
        ("generate", "mlp", r"no mlp_in in layers \[1\], no mlp_out in layers \[1\]"),
        ("train", "mlp", r"no mlp_in in layers \[1\], no mlp_out in layers \[1\]"),
    ],
)
def test_a_stream_that_no_hook_saw_is_an_error(run: str, name: str, message: str) -> None:
    """Never uninitialised memory."""
    model = replacement("llama", "plt", torch.float32)
    bypass_hooks(model.hf_model, name)
    with pytest.raises(pc.FamilyError, match=message):
        RUNS[run][0](model)
