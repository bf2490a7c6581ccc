"""Training of transcoders on activations, sparse in forward and backward, and their evaluation."""

from .evaluate import Evaluation, evaluate
from .recipe import Recipe
from .trainer import History, Trainer, train

__all__ = ["Evaluation", "History", "Recipe", "Trainer", "evaluate", "train"]
