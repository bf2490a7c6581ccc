"""`pycircuit intervene` and `pycircuit generate`."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

import pycircuit as pc
from pycircuit.interventions.intervention import FREEZE

from .changes import Change, Steering, parse_location
from .console import console, emit, table
from .options import AsJson, Ids, Opening, Prompt, PromptList, Prompts, Running, completions, parse_layers
from .texts import Text


def intervene(
    opening: Opening,
    prompt: Prompt = None,
    ids: Ids = False,
    *,
    steering: Steering,
    freeze: Annotated[
        str,
        typer.Option(
            help="What keeps its values of the unchanged prompt: " + " | ".join(FREEZE),
            autocompletion=completions(*FREEZE),
        ),
    ] = "attention",
    layers: Annotated[str | None, typer.Option(help="Layers inside which nothing is recomputed, as in 3-7.")] = None,
    effects: Annotated[
        list[str] | None, typer.Option("--effect", help="LAYER/POSITION/FEATURE whose change is printed; or several.")
    ] = None,
    top: Annotated[int, typer.Option(help="Next tokens shown.", min=1)] = 10,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Set, scale or ablate features, and see the next token's probabilities before and after."""
    (text,) = PromptList.of(prompt, None, ids).texts
    changes = steering.changes()
    layer_range = parse_layers(layers)
    features = [_parse_effect(effect) for effect in effects or ()]
    if not changes:
        raise ValueError("intervene: one of --set, --scale and --ablate must be given, got none")
    if freeze not in FREEZE:
        raise ValueError(f"--freeze must be one of {', '.join(FREEZE)}, got {freeze!r}")
    with opening.opened(running) as model:
        result = pc.intervene(model, text, _interventions(model, changes), freeze=freeze, layers=layer_range)
        tokens = _tokens(model, result, top)
        moved = result.effect(features).tolist() if features else []
    effects_json = [
        {"layer": layer, "position": position, "feature": feature, "change": change}
        for (layer, position, feature), change in zip(features, moved, strict=True)
    ]
    if as_json:
        results = {"tokens": tokens, "effects": effects_json, "notes": list(result.notes)}
        emit({"prompt": text, "freeze": freeze, "layers": layers, **results})
        return
    _print(tokens, effects_json)
    for note in result.notes:
        console().print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _tokens(model: pc.ReplacementModel, result: pc.Intervened, count: int) -> list[dict[str, Any]]:
    """Next tokens that are likeliest before or after, likeliest after first, with both probabilities."""
    before, after = result.probabilities_before, result.probabilities
    tokens = torch.maximum(before, after).topk(min(count, len(after))).indices
    tokens = tokens[after[tokens].argsort(descending=True, stable=True)]
    return [
        {"id": token, "text": _token_text(model, token), "before": float(before[token]), "after": float(after[token])}
        for token in tokens.tolist()
    ]


def _interventions(model: pc.ReplacementModel, changes: list[Change]) -> list[pc.Intervention]:
    return [intervention for change in changes for intervention in change.interventions(model)]


def _parse_effect(text: str) -> tuple[int, int, int]:
    """Parse a feature at one position."""
    layer, position, feature = parse_location("--effect", text)
    if not isinstance(position, int):
        raise ValueError(f"--effect must name one position, got {text!r}")
    return layer, position, feature


def _token_text(model: pc.ReplacementModel, token: int) -> str:
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))


def _print(tokens: list[dict[str, Any]], effects: list[dict[str, Any]]) -> None:
    terminal, rows = console(), table("next token", "before", "after")
    for token in tokens:
        rows.add_row(repr(token["text"]), f"{100 * token['before']:.2f}%", f"{100 * token['after']:.2f}%")
    terminal.print(rows)
    for effect in effects:
        location = f"{effect['layer']}/{effect['position']}/{effect['feature']}"
        terminal.print(f"{location}: {effect['change']:+.4g}", highlight=False)


def generate(
    opening: Opening,
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: Ids = False,
    *,
    steering: Steering,
    max_new_tokens: Annotated[int, typer.Option(help="At most.", min=1)] = 20,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Generate text with features set, scaled or ablated (a position of 5: steers the new tokens too)."""
    prompt_list = PromptList.of(prompt, prompts, ids)
    changes = steering.changes()
    with opening.opened(running) as model:
        prompt_list.check(model)
        new_tokens: Any = pc.generate(
            model,
            prompt_list.texts,
            steer=_interventions(model, changes),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        results = [_continuation(model, *pair) for pair in zip(prompt_list.texts, new_tokens, strict=True)]
    if as_json:
        emit(results if prompt_list.from_file else results[0])
        return
    for result in results:
        print(result["text"])


def _continuation(model: pc.ReplacementModel, prompt: Text, ids: list[int]) -> dict[str, Any]:
    """Prompt, new tokens and their text, for JSON."""
    text = " ".join(map(str, ids)) if model.tokenizer is None else str(model.tokenizer.decode(ids))
    return {"prompt": prompt, "tokens": ids, "text": text}
