"""Notes on interventions that do less than they seem to: a silent feature, a slice past the end, a feature twice."""

from __future__ import annotations

from collections.abc import Sequence

from .intervention import Intervention

_SHOWN = 6  # positions named in a note

Positioned = Sequence[tuple[Intervention, range]]  # interventions, each with its positions


def notes_before(interventions: Positioned, prompt: int) -> list[str]:
    """Notes that need no run: slices that end past a prompt of `prompt` tokens, features that are changed twice."""
    notes = []
    changed: set[tuple[int, int, int]] = set()
    repeated: dict[tuple[int, int], list[int]] = {}
    for intervention, positions in interventions:
        key = (intervention.layer, intervention.feature)
        end = intervention.position.stop if isinstance(intervention.position, slice) else None
        if end is not None and end > prompt:
            notes.append(
                f"{_name(intervention)}: position {_slice(intervention)} goes past the end, the change is at "
                f"{_listed(positions)} of {prompt} positions"
            )
        for position in positions:
            place = (*key, position)
            if place in changed:
                repeated.setdefault(key, []).append(position)
            changed.add(place)
    for (layer, feature), places in repeated.items():
        notes.append(
            f"layer {layer} feature {feature}: changed more than once at {_listed(sorted(set(places)))}, the last "
            "change alone counts"
        )
    return notes


def notes_after(interventions: Positioned, unchanged: set[tuple[int, int, int]]) -> list[str]:
    """Notes on interventions that moved no activation. unchanged: (layer, position, feature) of changes of zero."""
    notes = []
    for intervention, positions in interventions:
        layer, feature = intervention.layer, intervention.feature
        if all((layer, position, feature) in unchanged for position in positions):
            reason = "it is inactive there" if not intervention.value else f"it is {intervention.value:g} there already"
            if intervention.factor == 1:
                reason = "the factor is 1"
            notes.append(f"{_name(intervention)}: nothing changes at {_listed(positions)}, {reason}")
    return list(dict.fromkeys(notes))


def _name(intervention: Intervention) -> str:
    return f"layer {intervention.layer} feature {intervention.feature}"


def _slice(intervention: Intervention) -> str:
    assert isinstance(intervention.position, slice)
    bounds = (intervention.position.start, intervention.position.stop, intervention.position.step)
    texts = ["" if bound is None else str(bound) for bound in bounds]
    return ":".join(texts if texts[2] else texts[:2])


def _listed(positions: Sequence[int]) -> str:
    """Positions as a person writes them: 3; 3 and 5; 3 to 7; 1, 4, 6 and 9 more."""
    numbers = list(positions)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    if len(numbers) > _SHOWN:
        return ", ".join(map(str, numbers[:_SHOWN])) + f" and {len(numbers) - _SHOWN} more"
    texts = [str(number) for number in numbers]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]
