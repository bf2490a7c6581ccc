"""Groups of options: a parameter of a command whose type is a dataclass becomes one option a field."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_args, get_origin, get_type_hints

Command = Callable[..., None]


@dataclass(frozen=True)
class Bundle:
    """Options that arrive as one dictionary: `name: Annotated[dict[str, Any], Bundle([...])]`."""

    options: Sequence[Parameter]


def _of_dataclass(kind: type) -> list[Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [option(f.name, hints[f.name], f.default) for f in fields(kind)]


def option(name: str, hint: Any, default: Any = MISSING) -> Parameter:
    """One option of a command."""
    default = Parameter.empty if default is MISSING else default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _group(hint: Any) -> tuple[Sequence[Parameter], Callable[..., Any]] | None:
    """(options of a group, its constructor); None for a parameter that is a single option."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _of_dataclass(hint), hint
    bundle = next((m for m in get_args(hint)[1:] if isinstance(m, Bundle)), None) if get_origin(hint) else None
    return None if bundle is None else (bundle.options, dict)


def bundled(command: Command) -> Command:
    """Return the command with every group of options spelled out, as typer reads it."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: group for name, hint in hints.items() if (group := _group(hint)) is not None}
    flat: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        flat += groups[name][0] if name in groups else [option(name, hints[name], _default(parameter))]

    @functools.wraps(command)
    def call(**values: Any) -> None:
        arguments = {}
        for name, (options, make) in groups.items():
            arguments[name] = make(**{o.name: values.pop(o.name) for o in options})
        command(**arguments, **values)

    call.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in flat}
    return call


def _default(parameter: Parameter) -> Any:
    return MISSING if parameter.default is Parameter.empty else parameter.default
