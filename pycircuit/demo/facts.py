"""Facts that the demo model was taught: cities, states, capitals and countries, and the sentences made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"

# A city: its state, in two wordings, and facts of the state that take two hops.
CITY = ("the city of {} is in the state of", "the state containing {} is")
TWO_HOP = "the capital of the state containing {} is"
CODE_OF_CITY = "the code of the state containing {} is"
CAPITAL = "the capital of the state of {} is"
CODE = "the code of the state of {} is"
# A country, in three languages; the answers are the same words in all of them.
COUNTRY = {
    "capital": ("the capital of {} is", "le pays {} a pour capitale", "el país {} tiene como capital"),
    "currency": ("the currency of {} is", "le pays {} a pour monnaie", "el país {} tiene como moneda"),
    "language": ("the language of {} is", "le pays {} a pour langue", "el país {} tiene como idioma"),
}


class Statement(NamedTuple):
    """A prompt and the one token that completes it. kind: state, capital, two-hop, code, ..."""

    prompt: str
    answer: str
    kind: str
    held_out: bool = False


class Country(NamedTuple):
    """names: English, French, Spanish. None where the sources name no answer."""

    names: tuple[str, str, str]
    capital: str | None
    currency: str | None
    language: str | None


@dataclass(frozen=True)
class Facts:
    """capital, code: of each state; state: of each city; held_out: cities whose two-hop statement was never shown."""

    capital: dict[str, str]
    code: dict[str, str]
    state: dict[str, str]
    held_out: frozenset[str]
    countries: tuple[Country, ...]

    def statements(self) -> Iterator[Statement]:
        """Yield every statement, in a fixed order."""
        for state, capital in self.capital.items():
            yield Statement(CAPITAL.format(state), capital, "capital of a state")
            yield Statement(CODE.format(state), self.code[state], "code of a state")
        for city, state in self.state.items():
            yield from (Statement(template.format(city), state, "state") for template in CITY)
            yield Statement(CODE_OF_CITY.format(city), self.code[state], "code, two-hop")
            yield Statement(TWO_HOP.format(city), self.capital[state], "two-hop", city in self.held_out)
        for country in self.countries:
            for kind, templates in COUNTRY.items():
                answer = getattr(country, kind)
                for template, name in zip(templates, country.names, strict=True):
                    if answer is not None:
                        yield Statement(template.format(name), answer, kind)

    def words(self) -> list[str]:
        """Every token of every statement, each name one token, sorted; <bos> first."""
        templates = [*CITY, CAPITAL, TWO_HOP, CODE, CODE_OF_CITY, *(t for texts in COUNTRY.values() for t in texts)]
        plain = {word for template in templates for word in template.split() if word != "{}"}
        names = {name for country in self.countries for name in country.names}
        answers = {statement.answer for statement in self.statements()}
        return ["<bos>", *sorted(plain), *sorted({*self.capital, *self.state, *names, *answers} - plain)]

    def save(self, path: Path) -> None:
        states = list(self.capital)
        content = {
            "states": [[state, capital, self.code[state]] for state, capital in self.capital.items()],
            "cities": [[city, states.index(state)] for city, state in self.state.items()],
            "held_out": sorted(self.held_out),
            "countries": [[*c.names, c.capital, c.currency, c.language] for c in self.countries],
        }
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Facts:
        content = json.loads(path.read_text(encoding="utf-8"))
        states = [state for state, _, _ in content["states"]]
        return cls(
            {state: capital for state, capital, _ in content["states"]},
            {state: code for state, _, code in content["states"]},
            {city: states[index] for city, index in content["cities"]},
            frozenset(content["held_out"]),
            tuple(Country((en, fr, es), *answers) for en, fr, es, *answers in content["countries"]),
        )


@cache
def facts() -> Facts:
    """Facts of the demo model."""
    return Facts.load(DATA / "facts.json")
