"""`pycircuit intervene` and `pycircuit generate`."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

import pycircuit as pc
from pycircuit.interventions.intervention import FREEZE

from .changes import Change, Steering, spot
from .console import console, emit, table
from .options import AsJson, Ids, Opening, Prompt, Prompts, Running, among, layers_of, prompts_of


def intervene(
    opening: Opening,
    prompt: Prompt = None,
    ids: Ids = False,
    *,
    steering: Steering,
    freeze: Annotated[
        str,
        typer.Option(help="What keeps its values of the prompt: " + " | ".join(FREEZE), autocompletion=among(*FREEZE)),
    ] = "attention",
    layers: Annotated[str | None, typer.Option(help="Inside these nothing is computed anew, as in 3-7.")] = None,
    effects: Annotated[
        list[str] | None, typer.Option("--effect", help="LAYER/POSITION/FEATURE whose change is told; or several.")
    ] = None,
    top: Annotated[int, typer.Option(help="Next tokens shown.", min=1)] = 10,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Set, scale or ablate features, and see the next token's probabilities before and after."""
    (asked,) = prompts_of(prompt, None, ids)
    changes, within = steering.changes(), layers_of(layers)
    watched = [_watched(given) for given in effects or ()]
    if not changes:
        raise ValueError("intervene: one of --set, --scale and --ablate must be given, got none")
    if freeze not in FREEZE:
        raise ValueError(f"--freeze must be one of {', '.join(FREEZE)}, got {freeze!r}")
    with opening.opened(running) as model:
        result = pc.intervene(model, asked, _on(model, changes), freeze=freeze, layers=within)
        before, after = result.probabilities_before, result.probabilities
        most = torch.maximum(before, after).topk(min(top, len(after))).indices
        most = most[after[most].argsort(descending=True, stable=True)]
        tokens = [
            {"id": t, "text": _text(model, t), "before": float(before[t]), "after": float(after[t])}
            for t in most.tolist()
        ]
        moved = result.effect(watched).tolist() if watched else []
    named = [
        {"layer": at[0], "position": at[1], "feature": at[2], "change": change}
        for at, change in zip(watched, moved, strict=True)
    ]
    if as_json:
        emit({"prompt": asked, "freeze": freeze, "layers": layers, "tokens": tokens, "effects": named})
        return
    _print(tokens, named)


def _on(model: pc.ReplacementModel, changes: list[Change]) -> list[pc.Intervention]:
    return [made for change in changes for made in change.on(model)]


def _watched(given: str) -> tuple[int, int, int]:
    layer, position, feature = spot("--effect", given)
    if not isinstance(position, int):
        raise ValueError(f"--effect must name one position, got {given!r}")
    return layer, position, feature


def _text(model: pc.ReplacementModel, token: int) -> str:
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))


def _print(tokens: list[dict[str, Any]], effects: list[dict[str, Any]]) -> None:
    show, rows = console(), table("next token", "before", "after")
    for t in tokens:
        rows.add_row(repr(t["text"]), f"{100 * t['before']:.2f}%", f"{100 * t['after']:.2f}%")
    show.print(rows)
    for e in effects:
        show.print(f"{e['layer']}/{e['position']}/{e['feature']}: {e['change']:+.4g}", highlight=False)


def generate(
    opening: Opening,
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: Ids = False,
    *,
    steering: Steering,
    max_new_tokens: Annotated[int, typer.Option(help="At the most.", min=1)] = 20,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Only the likeliest few are drawn from.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest up to this probability are.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Let the model go on, with features set, scaled or ablated on the way (position 5: steers what follows too)."""
    asked, steer = prompts_of(prompt, prompts, ids), steering.changes()
    with opening.opened(running) as model:
        found: Any = pc.generate(
            model, asked, steer=_on(model, steer), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed,
        )  # fmt: skip
        written = [_written(model, one, ids) for one, ids in zip(asked, found, strict=True)]
    if as_json:
        emit(written if prompts is not None else written[0])
        return
    for one in written:
        print(one["text"])


def _written(model: pc.ReplacementModel, prompt: Any, ids: list[int]) -> dict[str, Any]:
    text = " ".join(map(str, ids)) if model.tokenizer is None else str(model.tokenizer.decode(ids))
    return {"prompt": prompt, "tokens": ids, "text": text}
