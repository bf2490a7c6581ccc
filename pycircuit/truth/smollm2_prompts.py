"""Prompts for SmolLM2 by behaviour: more than ten of each, of which those that it answers are used."""

from __future__ import annotations


def _filled(template: str, pairs: str) -> list[tuple[str, str]]:
    """Prompts of a template, whose {} is the subject. pairs: `subject: answer` with semicolons between."""
    split = [pair.split(":") for pair in pairs.split(";")]
    return [(template.format(subject.strip()), f" {answer.strip()}") for subject, answer in split]


_CITIES = (
    "Dallas: Texas; Houston: Texas; Chicago: Illinois; Seattle: Washington; Miami: Florida; Denver: Colorado; "
    "Atlanta: Georgia; Boston: Massachusetts; Detroit: Michigan; Phoenix: Arizona; Portland: Oregon; Orlando: Florida; "
    "Austin: Texas; Nashville: Tennessee; Philadelphia: Pennsylvania; Cleveland: Ohio; Memphis: Tennessee; "
    "Pittsburgh: Pennsylvania; Tampa: Florida; Honolulu: Hawaii; Milwaukee: Wisconsin; Baltimore: Maryland; "
    "New Orleans: Louisiana; Salt Lake City: Utah; Las Vegas: Nevada; Los Angeles: California"
)
_CAPITALS = (
    "France: Paris; Italy: Rome; Japan: Tokyo; Spain: Madrid; Germany: Berlin; Russia: Moscow; Egypt: Cairo; "
    "Greece: Athens; Portugal: Lisbon; Ireland: Dublin; Austria: Vienna; Poland: Warsaw; Cuba: Havana; "
    "Peru: Lima; Kenya: Nairobi; Iraq: Baghdad; Iran: Tehran; Norway: Oslo; Sweden: Stockholm; Hungary: Budapest; "
    "South Korea: Seoul; China: Beijing; Thailand: Bangkok; Argentina: Buenos; Canada: Ottawa; Turkey: Ankara"
)
_SYMBOLS = (
    "gold: Au; silver: Ag; iron: Fe; sodium: Na; potassium: K; copper: Cu; helium: He; oxygen: O; hydrogen: H; "
    "carbon: C; nitrogen: N; lead: Pb; tin: Sn; mercury: Hg; calcium: Ca; magnesium: Mg; zinc: Zn; aluminum: Al; "
    "chlorine: Cl; silicon: Si; sulfur: S; neon: Ne; lithium: Li; nickel: Ni; uranium: U; phosphorus: P"
)
_OPPOSITES = (
    "fast: slow; tall: short; old: young; happy: sad; up: down; open: closed; light: dark; rich: poor; "
    "strong: weak; early: late; wet: dry; good: bad; high: low; hard: soft; long: short; full: empty; loud: quiet; "
    "heavy: light; thick: thin; wide: narrow; black: white; left: right; day: night; clean: dirty; deep: shallow"
)
_PASTS = (
    "run: ran; see: saw; take: took; give: gave; write: wrote; eat: ate; drive: drove; swim: swam; "
    "speak: spoke; break: broke; fly: flew; sing: sang; know: knew; grow: grew; begin: began; choose: chose; "
    "fall: fell; drink: drank; throw: threw; make: made; find: found; buy: bought; think: thought; bring: brought; "
    "teach: taught; say: said; hear: heard; leave: left; meet: met; win: won; lose: lost; sit: sat; tell: told; "
    "keep: kept; feel: felt; send: sent; stand: stood"
)
_LANDMARKS = (
    "The Eiffel Tower: Paris; The Colosseum: Rome; Big Ben: London; The Louvre: Paris; The Statue of Liberty: New; "
    "The Empire State Building: New; The Kremlin: Moscow; The Brandenburg Gate: Berlin; The Acropolis: Athens; "
    "The Golden Gate Bridge: San; The White House: Washington; The Space Needle: Seattle; Buckingham Palace: London; "
    "The Sydney Opera House: Sydney; The Burj Khalifa: Dubai; The Sistine Chapel: Rome; Notre-Dame: Paris; "
    "The Hermitage Museum: St; The Parthenon: Athens; The Arc de Triomphe: Paris; Westminster Abbey: London; "
    "The Forbidden City: Beijing; The Tower of London: London; The Lincoln Memorial: Washington; "
    "The Uffizi Gallery: Florence; The Prado Museum: Madrid; The Pantheon: Rome; "
    "The Sagrada Familia: Barcelona; The Taj Mahal: Agra; The CN Tower: Toronto; The Hagia Sophia: Istanbul; "
    "The Blue Mosque: Istanbul; Times Square: New; Trafalgar Square: London; The Trevi Fountain: Rome; The Alamo: San; "
    "The Alhambra: Granada; The Charles Bridge: Prague; The Leaning Tower: Pisa; The Brooklyn Bridge: New; "
    "The Art Institute of Chicago: Chicago; The London Eye: London; The Berlin Wall: Berlin; "
    "The Moulin Rouge: Paris; The Royal Palace of Madrid: Madrid; The Tokyo Tower: Tokyo"
)
_LANGUAGES = (
    "Brazil: Portuguese; Mexico: Spanish; Japan: Japanese; Germany: German; Italy: Italian; Russia: Russian; "
    "China: Mandarin; Egypt: Arabic; Austria: German; Argentina: Spanish; Portugal: Portuguese; France: French; "
    "Sweden: Swedish; Poland: Polish; Greece: Greek; Turkey: Turkish; Cuba: Spanish; Iraq: Arabic; Finland: Finnish; "
    "Hungary: Hungarian; Chile: Spanish; Vietnam: Vietnamese; Denmark: Danish; Thailand: Thai; Norway: Norwegian"
)
_NAMES = (
    ("Mary", "John"), ("Tom", "James"), ("Dan", "Sarah"), ("Alice", "Bob"), ("Anna", "Peter"), ("Paul", "Laura"),
    ("Kate", "Mark"), ("Lucy", "David"), ("Emma", "Jack"), ("Susan", "Robert"), ("Michael", "Jane"), ("Sam", "Rachel"),
    ("George", "Lisa"), ("Henry", "Julia"), ("Simon", "Amy"), ("Linda", "Chris"),
)  # fmt: skip
_PLACES = ("store", "park", "school", "office")
_GIFTS = ("drink", "book", "ball", "ring")
_WORDS = (
    "apple river", "window seven", "garden copper", "doctor yellow", "silver engine", "market purple", "bridge tiger",
    "letter mountain", "orange village", "hammer forest", "pencil ocean", "castle monkey", "winter basket",
    "rocket butter", "island camera", "candle dragon",
)  # fmt: skip
_SEQUENCES = (
    "Monday, Tuesday, Wednesday, Thursday,: Friday; January, February, March, April, May,: June; "
    "one, two, three, four, five,: six; A, B, C, D, E,: F; first, second, third, fourth,: fifth; "
    "ten, nine, eight, seven, six,: five; P, Q, R, S, T,: U; a, b, c, d, e, f,: g; three, four, five, six,: seven; "
    "I, II, III, IV, V,: VI; twenty, thirty, forty, fifty,: sixty; April, May, June, July, August,: September; "
    "Tuesday, Wednesday, Thursday, Friday,: Saturday; K, L, M, N, O,: P; h, i, j, k, l,: m; "
    "eleven, twelve, thirteen, fourteen,: fifteen; two, four, six, eight,: ten; F, G, H, I, J,: K; "
    "ten, twenty, thirty, forty,: fifty; sixth, seventh, eighth, ninth,: tenth; nine, eight, seven, six, five,: four; "
    "Wednesday, Thursday, Friday, Saturday,: Sunday; June, July, August, September, October,: November"
)


def _indirect_objects() -> list[tuple[str, str]]:
    """Who gets it: the one of two names that is not said again."""
    return [
        (f"When {a} and {b} went to the {place}, {b} gave a {gift} to", f" {a}")
        for (a, b), place, gift in zip(_NAMES, _PLACES * 4, _GIFTS * 4, strict=True)
    ]


def _repeated() -> list[tuple[str, str]]:
    """Four words that never go together, said three times and begun again."""
    lists = [f"{first} {second}" for first, second in zip(_WORDS, [*_WORDS[5:], *_WORDS[:5]], strict=True)]
    return [(f"{text}. {text}. {text}. {text.rpartition(' ')[0]}", f" {text.rpartition(' ')[2]}") for text in lists]


PROMPTS: dict[str, list[tuple[str, str]]] = {
    "state of a city": _filled("The city of {} is in the state of", _CITIES),
    "capital of a country": _filled("The capital of {} is the city of", _CAPITALS),
    "chemical symbol": _filled("The chemical symbol for {} is", _SYMBOLS),
    "opposite": _filled("hot - cold, big - small, {} -", _OPPOSITES),
    "past tense": _filled("go - went, come - came, {} -", _PASTS),
    "city of a landmark": _filled("{} is located in the city of", _LANDMARKS),
    "language of a country": _filled("Spain - Spanish, England - English, Israel - Hebrew, {} -", _LANGUAGES),
    "indirect object": _indirect_objects(),
    "repeated words": _repeated(),
    "next in a sequence": _filled("{}", _SEQUENCES),
}
