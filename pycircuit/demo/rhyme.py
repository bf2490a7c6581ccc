"""A tiny model that writes the second line of a couplet, whose last word the first line fixes: sentences and training.

Attention sees three tokens, its own included. So the line break is the only place that sees the word to rhyme with and
is seen from where the rhyme is written: what the second line ends on must be there before that line begins.
"""

from __future__ import annotations

from pycircuit.model import ReplacementModel

from .tiny_models import Recipe, Sentence, tiny_model

SUBJECTS = ("cat", "owl", "king", "maid", "monk")
VERBS = ("ran", "came", "walked", "slept")
RHYMES = {  # the word that the second line ends on, by ends of the first line
    "knight": ("night", "height", "kite"),
    "bear": ("stair", "hair", "fair"),
    "bee": ("tree", "sea", "quay"),
    "jay": ("bay", "way", "hay"),
    "crown": ("town", "gown", "down"),
    "bloom": ("room", "gloom", "tomb"),
}
RECIPE = Recipe(steps=400, features=96, k=(1, 6, 6), window=3, transcoder_steps=400)


def first_line(subject: str, verb: str, end: str) -> str:
    """The first line of a couplet, comma and line break included."""
    return f"the {subject} {verb} by {end} , /"


def sentences() -> list[Sentence]:
    """Every couplet."""
    lines = {end: f"saw a {rhyme}" for rhyme, ends in RHYMES.items() for end in ends}
    return [
        Sentence(first_line(subject, verb, end), line)
        for subject in SUBJECTS
        for verb in VERBS
        for end, line in lines.items()
    ]


def rhyme_model() -> ReplacementModel:
    """Train the model and its transcoders: some seconds on one core.

    It learns to rhyme at the line break first: from nothing it does not find out that the line break can carry a word.
    """
    at_once = [Sentence(couplet.prompt, couplet.answer.split()[-1]) for couplet in sentences()]
    return tiny_model(sentences(), RECIPE, easier=at_once)
