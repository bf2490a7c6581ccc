"""Transcoders from activations: training that is sparse forward and backward, and what came of it."""

from .evaluate import Evaluation, evaluate
from .recipe import Recipe
from .trainer import History, Trainer, train

__all__ = ["Evaluation", "History", "Recipe", "Trainer", "evaluate", "train"]
