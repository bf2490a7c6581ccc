"""Behaviours: prompts of one kind that a model answers, of the demo model and of SmolLM2."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch

from pycircuit.demo.facts import Statement, facts
from pycircuit.model import ReplacementModel
from pycircuit.progress import Progress, Report

PROMPTS, LEAST = 10, 0.5  # prompts of a behaviour; probability of the answer, which must be above it
SEED = 17


class Candidate(NamedTuple):
    """A prompt and the text that should follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Behaviour:
    """A name, and more prompts than are needed: those that the model does not answer are left out."""

    name: str
    candidates: tuple[Candidate, ...]


class Question(NamedTuple):
    """A prompt that the model answers. token: the first of the answer, which is the likeliest; probability: its own."""

    behaviour: str
    prompt: str
    answer: str
    token: int
    probability: float


def behaviours(model: str) -> tuple[Behaviour, ...]:
    """Behaviours of a model that is known by name."""
    if model == "demo":
        return demo_behaviours()
    if model == "smollm2":
        prompts = import_module("pycircuit.truth.smollm2_prompts")
        return tuple(
            Behaviour(name, tuple(Candidate(*pair) for pair in pairs)) for name, pairs in prompts.PROMPTS.items()
        )
    raise ValueError(f"benchmark-truth: model must be demo or smollm2, got {model!r}")


def demo_behaviours() -> tuple[Behaviour, ...]:
    """Ten kinds of statement that the demo model was taught, each in a random order."""
    groups: dict[str, list[Candidate]] = {}
    for statement in facts().statements():
        groups.setdefault(_kind(statement), []).append(Candidate(statement.prompt, statement.answer))
    draw = random.Random(SEED)
    return tuple(Behaviour(name, tuple(draw.sample(groups[name], len(groups[name])))) for name in sorted(groups))


def _kind(statement: Statement) -> str:
    if statement.kind == "state":
        return "state of a city" if statement.prompt.startswith("the city") else "state containing a city"
    if statement.kind in ("capital", "currency", "language"):
        return f"{statement.kind} of a country"
    return statement.kind + (", held out" if statement.held_out else "")


def answered(
    model: ReplacementModel, groups: Sequence[Behaviour], count: int = PROMPTS, progress: bool | Report = False
) -> list[Question]:
    """Return the first `count` prompts of each behaviour whose answer is likelier than LEAST."""
    questions: list[Question] = []
    line = Progress(progress)
    for i, behaviour in enumerate(groups):
        line.step("questions", i, len(groups), "behaviours")
        passed: list[Question] = []
        for candidate in behaviour.candidates:
            if len(passed) == count:
                break
            question = _ask(model, behaviour.name, candidate)
            if question is not None:
                passed.append(question)
        if len(passed) < count:
            raise ValueError(
                f"benchmark-truth: {behaviour.name} must have {count} prompts answered with more than {LEAST}, got "
                f"{len(passed)}"
            )
        questions += passed
    line.close()
    return questions


def _ask(model: ReplacementModel, name: str, candidate: Candidate) -> Question | None:
    """The question, or None where the model answers otherwise or hesitates."""
    ids = model.tokens(candidate.prompt)
    with torch.no_grad():
        logits = model.hf_model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]
    probability, token = (value.item() for value in logits.float().softmax(-1).max(0))
    follows = model.tokens(candidate.prompt + candidate.answer) if candidate.answer.startswith(" ") else None
    expected = model.tokens(candidate.answer)[-1] if follows is None else follows[len(ids)]
    if token != int(expected) or probability <= LEAST:
        return None
    return Question(name, candidate.prompt, candidate.answer, int(token), probability)
