"""The application runs the model in other threads meanwhile: its numbers and ours, and what an interrupt leaves."""

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
from pycircuit.model.replacement import attention_by
from pycircuit.training.stream import Source

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, OTHER = builders.prompt(), builders.prompt(11, seed=4)
STEER = [pc.Intervention(0, 3, 5, 2.0)]
PLACES = {"before-inside": (False, True), "inside-after": (True, False), "before-after": (False, False),
          "inside-inside": (True, True)}  # fmt: skip
SECONDS = 60  # a thread that waits longer will never come


def graph(model: pc.ReplacementModel) -> list[Tensor]:
    found = pc.attribute(model, PROMPT, max_features=6, progress=False)
    return [found.rows.weight, found.bias, found.values, found.features]


def activations(model: pc.ReplacementModel, prompts: int) -> list[Tensor]:
    return [t for one in model.activations([PROMPT] * prompts) for f in one for t in (f.index, f.value)]


def gathered(model: pc.ReplacementModel) -> list[Tensor]:
    """Activations as training gathers them."""
    source = Source(model.hf_model, model.family, model.weights, "mlp_in", "mlp_out", 1)
    return list(source.activations([PROMPT, PROMPT[:7]]))


# name -> (what we run, which of its forwards is met)
RUNS: dict[str, tuple[Callable[[pc.ReplacementModel], list[Tensor]], int]] = {
    "attribute": (graph, 1),
    "activations": (lambda model: activations(model, 1), 1),
    "activations_together": (lambda model: activations(model, 2), 1),
    "intervene": (lambda model: [pc.intervene(model, PROMPT, STEER).logits], 1),
    "intervene_changed": (lambda model: [pc.intervene(model, PROMPT, STEER, "none").logits], 2),
    "generate": (lambda model: [torch.tensor(pc.generate(model, PROMPT, STEER, max_new_tokens=4))], 2),
    "train": (gathered, 1),
    "open": (lambda model: graph(pc.ReplacementModel(model.hf_model, model.transcoders)), 2),  # its probe, then a graph
}


def forward(model: Any) -> list[Tensor]:
    """The application's own."""
    with torch.no_grad():
        return [model(input_ids=OTHER[None], use_cache=False).logits]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


class Meeting:
    """A run of ours in this thread and another one in its own, which begins and ends before, inside or after ours.

    Both stop before the second layer; the other thread's masks are made by then, its attention is not.
    """

    def __init__(self, layer: Any, other: Callable[[], Any], other_layer: Any, place: str, turn: int) -> None:
        self.starts_inside, self.ends_inside = PLACES[place]
        self.other, self.turn, self.calls, self.thread = other, turn, 0, get_ident()
        self.stopped, self.going = Event(), Event()
        self.pool, self.future = ThreadPoolExecutor(1), Future()  # type: tuple[ThreadPoolExecutor, Future[Any]]
        self.handles = [layer.register_forward_pre_hook(self._ours)]
        self.handles.append(other_layer.register_forward_pre_hook(self._theirs))

    def run(self, act: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        try:
            with self.pool:
                if not self.starts_inside:
                    self._start()
                ours = act()
                self.going.set()
                return ours, self.future.result(SECONDS)
        finally:
            self.going.set()
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
            self.going.set()
            self.future.exception(SECONDS)

    def _theirs(self, *_: Any) -> None:
        if get_ident() != self.thread:
            self.stopped.set()
            assert self.going.wait(SECONDS)


def layers(model: Any) -> list[Any]:
    return list(model.get_submodule(pc.model.families.family_of(model).layers).children())


@pytest.mark.parametrize(("run", "place"), [(run, place) for run in RUNS for place in PLACES if run != "open"])
def test_an_application_runs_the_model_meanwhile(run: str, place: str) -> None:
    """Its forward gives exactly its own numbers and ours exactly those of a quiet run, wherever the two meet."""
    model, (act, turn) = replacement("mistral", "plt", torch.float32), RUNS[run]
    quiet, own = act(model), forward(model.hf_model)
    layer = layers(model.hf_model)[1]
    ours, theirs = Meeting(layer, lambda: forward(model.hf_model), layer, place, turn).run(lambda: act(model))
    assert same(theirs, own)
    assert same(ours, quiet)


@pytest.mark.parametrize("name", builders.CONFIGS)
def test_every_family_keeps_its_own_attention_in_other_threads(name: str) -> None:
    model = builders.build(name)
    ours = pc.ReplacementModel(model, replacement("llama", "plt", torch.float32).transcoders)
    quiet, layer = activations(ours, 1), layers(model)[1]
    for chosen in {model.config._attn_implementation, "eager"}:
        model.set_attn_implementation(chosen)
        own = forward(model)
        for place in ("before-inside", "inside-after"):
            meeting = Meeting(layer, lambda: forward(model), layer, place, 1)
            got, theirs = meeting.run(lambda: activations(ours, 1))
            assert same(theirs, own) and same(got, quiet), (chosen, place)


@pytest.mark.parametrize("place", PLACES)
def test_two_models_that_share_a_config(place: str) -> None:
    """Both are traced at once, and the config says afterwards what it said before."""
    first, second = (replacement("llama", "plt", torch.float32) for _ in range(2))
    with torch.no_grad():
        second.hf_model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    for m in second.hf_model.modules():
        if hasattr(m, "config"):
            m.config = first.hf_model.config
    before, quiet, other = dict(vars(first.hf_model.config)), graph(first), graph(second)
    layer, other_layer = (model.hf_model.model.layers[1] for model in (first, second))
    ours, theirs = Meeting(layer, lambda: graph(second), other_layer, place, 1).run(lambda: graph(first))
    assert same(ours, quiet) and same(theirs, other)
    assert vars(first.hf_model.config) == before and first.hf_model.config._attn_implementation == "sdpa"


def test_an_application_may_choose_another_attention_meanwhile() -> None:
    """It sees its own choice in its own thread, and the choice stays."""
    model = replacement("llama", "plt", torch.float32)
    config, quiet, seen = model.hf_model.config, graph(model), []

    def choose() -> None:
        seen.append(config._attn_implementation)
        model.hf_model.set_attn_implementation("eager")
        seen.append(config._attn_implementation)

    def hook(*_: Any) -> None:
        thread = Thread(target=choose)
        thread.start()
        thread.join()

    handle = model.hf_model.model.layers[1].register_forward_pre_hook(hook)
    ours = graph(model)
    handle.remove()
    assert seen == ["sdpa", "eager"] and config._attn_implementation == "eager"
    assert same(ours, quiet)


def test_an_application_thread_that_never_stops() -> None:
    """The same without a place to meet: whatever comes."""
    model, stop = replacement("gemma2", "plt", torch.float32), Event()
    quiet, own, wrong = graph(model), forward(model.hf_model), []

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
    assert all(same(each, quiet) for each in ours)


def state(model: Any) -> list[Any]:
    """What of ours could be left on a model: its hooks, and everything that its configs say."""
    hooks = [(m._forward_hooks, m._forward_hooks_with_kwargs, m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs)
             for m in model.modules()]  # fmt: skip
    configs = [dict(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    chosen = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return [[tuple(map(dict, dicts)) for dicts in hooks], configs, chosen]


Place = tuple[str, int, str]  # file, line, event


class Interrupted:
    """A run that is interrupted at a place in some files, at the last time that it comes there.

    Places are calls and lines. The end of a `with` is none: Python lets no signal in before what it calls there.
    """

    def __init__(self, act: Callable[[], Any], files: tuple[str, ...]) -> None:
        self.files = tuple(str(Path(pc.model.__file__).with_name(name)) for name in files)
        self.act, self.place, self.turn = act, None, 0  # type: tuple[Callable[[], Any], Place | None, int]
        self.turns: dict[Place, int] = {}

    def run(self, place: Place | None = None, turn: int = 0) -> dict[Place, int]:
        """The places that it came by, and how often."""
        self.place, self.turn, self.turns = place, turn, {}
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            self.act()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return self.turns

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.endswith(self.files) or frame.f_code.co_name in ("__del__", "<genexpr>"):
            return None  # Python drops an error in __del__, or in a generator that it closes
        place = (name, frame.f_lineno, event)
        if event in ("call", "line") and not linecache.getline(*place[:2]).lstrip().startswith("with "):
            self.turns[place] = self.turns.get(place, 0) + 1
            if place == self.place and self.turns[place] == self.turn:
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize(("run", "files"), [("activations", ("capture.py", "hooks.py")), ("generate", ("sites.py",))])
def test_an_interrupt_at_any_line_leaves_nothing(run: str, files: tuple[str, ...]) -> None:
    """Hooks, configs and the lock are as before, whichever line it falls on, those that clean up included."""
    model, (act, _) = replacement("llama", "plt", torch.float32), RUNS[run]
    quiet, own, before = act(model), forward(model.hf_model), state(model.hf_model)
    interrupted = Interrupted(lambda: act(model), files)
    places = interrupted.run()
    assert len(places) > 30
    for place, turn in places.items():
        interrupted.run(place, turn)
        assert state(model.hf_model) == before, place
    assert same(forward(model.hf_model), own)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(model.running.acquire, timeout=1).result()
        other.submit(model.running.release).result()
    assert same(act(model), quiet)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("run", RUNS)
def test_an_error_in_the_forward_leaves_nothing(run: str, error: type[BaseException]) -> None:
    model, (act, turn) = replacement("gemma3", "plt", torch.float32), RUNS[run]
    before, calls = state(model.hf_model), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == turn:
            raise error

    handle = layers(model.hf_model)[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        act(model)
    handle.remove()
    assert state(model.hf_model) == before


def test_a_choice_for_this_thread_is_nobody_elses() -> None:
    model = builders.build("gemma3")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    with ThreadPoolExecutor(1) as other, attention_by(model, "eager"):
        assert {config._attn_implementation for config in configs} == {"eager"}
        said = other.submit(lambda: {config._attn_implementation for config in configs}).result()
    assert said == {config._attn_implementation for config in configs} == {"sdpa"}


def test_compiled_layers_are_traced_as_they_are() -> None:
    """What torch.compile made of a layer serves every thread alike, so a trace runs the layer itself."""
    model = replacement("llama", "plt", torch.float32)
    inner = model.hf_model.model
    quiet = graph(model)
    inner.layers[0].compile(backend="eager")
    inner.layers[1] = torch.compile(inner.layers[1], backend="eager")
    compiled = [inner.layers[0]._compiled_call_impl, vars(inner.layers[1])["forward"]]
    assert same(graph(model), quiet)
    assert [inner.layers[0]._compiled_call_impl, vars(inner.layers[1])["forward"]] == compiled


def unhooked(model: Any, name: str) -> None:
    """The MLP of the second layer, or a norm, called in a way that no hook sees."""
    layer = model.model.layers[1]
    owner = layer.get_submodule(name)
    layer._modules[name] = Unseen(owner)


class Unseen(torch.nn.Module):
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
def test_what_no_hook_saw_is_an_error(run: str, name: str, message: str) -> None:
    """Never what was in memory before."""
    model = replacement("llama", "plt", torch.float32)
    unhooked(model.hf_model, name)
    with pytest.raises(pc.FamilyError, match=message):
        RUNS[run][0](model)
