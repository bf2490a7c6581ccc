"""A trace as a browser asks for it, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pycircuit.graph import Graph
from pycircuit.interventions import Intervention
from pycircuit.trace import Contrast, Feature
from pycircuit.trace.contrast import contrasts_of
from pycircuit.trace.targets import TargetLike

OP = "page"
LONGEST_PROMPT = 1_000_000  # characters
MOST_TARGETS = 100
_FEATURE = re.compile(r"(\d{1,9})/(\d{1,9})/(\d{1,9})", re.ASCII)
_FIELDS = {"prompt", "targets", "position", "max_features", "max_targets", "probability", "name"}


@dataclass(frozen=True)
class TraceRequest:
    """A prompt, and the arguments of pc.attribute that the page sets.

    name: the file's, or None. interventions: under which the prompt runs.
    """

    prompt: str | list[int]
    arguments: dict[str, Any]
    name: str | None
    interventions: tuple[Intervention, ...] = ()

    @classmethod
    def of(cls, body: dict[str, Any]) -> TraceRequest:
        """Read a body; whatever else pc.attribute checks, it checks."""
        unknown = sorted(set(map(str, body)) - _FIELDS)
        if unknown:
            raise ValueError(
                f"{OP}: a trace must have the fields {', '.join(sorted(_FIELDS))}, got {unknown[0][:80]!r}"
            )
        arguments: dict[str, Any] = {"targets": _targets(body.get("targets")), "position": _position(body)}
        for field, kinds in {"max_features": (int,), "max_targets": (int,), "probability": (int, float)}.items():
            value = body.get(field)
            if value is not None:
                if type(value) not in kinds:
                    raise TypeError(f"{OP}: {field} must be a number, got {type(value).__name__}")
                arguments[field] = value
        return cls(_prompt(body.get("prompt")), arguments, _name(body.get("name")))

    @classmethod
    def after(cls, graph: Graph, interventions: tuple[Intervention, ...], name: str) -> TraceRequest:
        """Return the trace of a graph's prompt under interventions.

        Its targets are those of the graph if these were named, else the tokens that are likeliest then; so many
        features get a row as in the graph.
        """
        rows = int((graph.row_node < graph.first_error).sum())
        positions = sorted(set(graph.targets.positions.tolist()))
        arguments = {"targets": _same_targets(graph), "position": positions, "max_features": max(1, rows)}
        return cls(graph.tokens.ids.tolist(), arguments, f"{name[:60]} after", interventions)


def _same_targets(graph: Graph) -> list[TargetLike] | None:
    """Targets of a graph that somebody named, if they are tokens and contrasts of one position."""
    settings = graph.provenance.get("settings")
    named = isinstance(settings, dict) and settings.get("targets") == "given"
    contrasts = contrasts_of(OP, graph, graph.vocab_size)
    ids = graph.targets.ids.tolist()
    if not named or len(set(graph.targets.positions.tolist())) != 1:
        return None
    if any(token < 0 and target not in contrasts for target, token in enumerate(ids)):
        return None
    return [Contrast(*contrasts[target]) if target in contrasts else token for target, token in enumerate(ids)]


def _prompt(prompt: object) -> str | list[int]:
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"{OP}: prompt must be a text of at most {LONGEST_PROMPT} characters, or token ids")
    return prompt


def _position(body: dict[str, Any]) -> int | list[int]:
    position = body.get("position")
    if position is None:
        return -1
    if type(position) is int or (isinstance(position, list) and position and all(type(p) is int for p in position)):
        return position
    raise TypeError(f"{OP}: position must be a whole number or a list of them")


def _name(name: object) -> str | None:
    if name is None or name == "":
        return None
    if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w .()-]{0,79}", name):
        raise ValueError(
            f"{OP}: name must be at most 80 letters, digits, spaces, dots and hyphens, got {str(name)[:80]!r}"
        )
    return name


def _targets(targets: object) -> list[TargetLike] | None:
    """Targets: texts of tokens, ids as {"id": 8941}, features as 3/5/412, {"tokens": [...], "against": [...]}."""
    if targets is None or targets == []:
        return None
    if not isinstance(targets, list) or len(targets) > MOST_TARGETS:
        raise ValueError(f"{OP}: targets must be a list of at most {MOST_TARGETS}")
    return [_target(target) for target in targets]


def _target(target: object) -> TargetLike:
    if isinstance(target, dict) and target.keys() == {"tokens", "against"}:
        return Contrast(_side(target["tokens"]), _side(target["against"]))
    if isinstance(target, str) and (match := _FEATURE.fullmatch(target)):
        return Feature(*map(int, match.groups()))
    return _token(target)


def _side(tokens: object) -> list[int | str]:
    return [_token(token) for token in (tokens if isinstance(tokens, list) else [tokens])]


def _token(token: object) -> int | str:
    if isinstance(token, str) and 0 < len(token) <= 200:
        return token
    if isinstance(token, dict) and token.keys() == {"id"} and type(token["id"]) is int:
        return int(token["id"])
    raise ValueError(f'{OP}: a target must be the text of a token, {{"id": N}}, a feature as 3/5/412 or a contrast')
