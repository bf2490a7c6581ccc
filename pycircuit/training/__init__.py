"""Training of transcoders on activations, sparse in forward and backward, and their evaluation."""

from .evaluate import Evaluation, evaluate
from .held_out import HeldOutPlan
from .history import HeldOutCurve, History
from .recipe import Recipe
from .trainer import Trainer, train
from .trainer_state import from_checkpoint

__all__ = [
    "Evaluation",
    "HeldOutCurve",
    "HeldOutPlan",
    "History",
    "Recipe",
    "Trainer",
    "evaluate",
    "from_checkpoint",
    "train",
]
