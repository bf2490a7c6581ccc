"""Training of transcoders on activations, sparse in forward and backward, and their evaluation."""

from .evaluate import Evaluation, evaluate
from .history import History
from .recipe import Recipe
from .trainer import Trainer, train

__all__ = ["Evaluation", "History", "Recipe", "Trainer", "evaluate", "train"]
