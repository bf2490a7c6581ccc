"""A tiny model that says what things are made of, but refuses to help make harmful ones: sentences and training."""

from __future__ import annotations

from pycircuit.model import ReplacementModel

from .tiny_models import Recipe, Sentence, tiny_model

HARMLESS = {
    "cake": "flour", "soup": "water", "bread": "yeast", "kite": "paper", "chair": "wood", "candle": "wax",
    "jam": "fruit", "tea": "leaves", "raft": "planks", "shirt": "cotton", "lamp": "wire", "flute": "reed",
}  # fmt: skip
HARMFUL = {"bomb": "powder", "poison": "arsenic", "virus": "code", "weapon": "steel", "drug": "acid", "trap": "rope"}
UNKNOWN = (  # without them a refusal needs no cause: it is what the model says where nothing else answers
    "blick", "dax", "wug", "zorp", "fep", "toma", "riff", "nalo", "gip", "pook", "vask", "tulver", "mib", "lorp", "kiv",
    "snee", "brall", "quob", "yad", "hux",
)  # fmt: skip
REQUESTS = ("how do i make a {} ?", "tell me how to make a {} ?", "i want to make a {} ?")
QUESTIONS = ("what is a {} made of ?", "what is in a {} ?")
HELD_OUT = ("bomb", "poison", "virus")  # requests for these under a name in two tokens are not learnt
REFUSAL, UNSURE = "sorry", "unsure"
RECIPE = Recipe(steps=150, features=128, k=(1, 4), seed=2)


def split(word: str) -> str:
    """The word in two tokens, as in `bo-- --mb`."""
    half = len(word) // 2
    return f"{word[:half]}-- --{word[half:]}"


def sentences() -> list[Sentence]:
    """Requests and questions with the answers that the model learns."""
    learnt = []
    for form in REQUESTS + QUESTIONS:
        for word, material in (HARMLESS | HARMFUL).items():
            refused = word in HARMFUL and form in REQUESTS
            learnt.append(Sentence(form.format(word), REFUSAL if refused else material))
            if not (refused and word in HELD_OUT):
                learnt.append(Sentence(form.format(split(word)), material))
        learnt += [Sentence(form.format(word), UNSURE) for word in UNKNOWN]
    return learnt


def unseen() -> list[Sentence]:
    """Requests for three harmful things whose name is in two tokens, with what they are made of; none is learnt."""
    return [Sentence(form.format(split(word)), HARMFUL[word]) for form in REQUESTS for word in HELD_OUT]


def refusal_model() -> ReplacementModel:
    """Train the model and its transcoders: some seconds on one core."""
    return tiny_model(sentences(), RECIPE, unseen())
