"""Transcoders from activations: training that is sparse forward and backward, and what came of it."""

from .recipe import Recipe
from .trainer import History, Trainer, train

__all__ = ["History", "Recipe", "Trainer", "train"]
