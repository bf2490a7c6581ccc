"""Attribution graphs as arrays: prune, score, follow, save, show. Knows no model."""

from .faithfulness import Agreement, Faithfulness
from .graph import Graph, Targets, Tokens
from .paths import Path
from .prune import Pruned
from .rows import Rows
from .scores import Scores
from .storage import GraphFileError

__all__ = [
    "Agreement", "Faithfulness", "Graph", "GraphFileError", "Path", "Pruned", "Rows", "Scores", "Targets", "Tokens",
]  # fmt: skip
