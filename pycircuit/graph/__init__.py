"""Attribution graphs as arrays, their analysis, files and pictures. Imports no model."""

from .comparison import ComparedEdge, ComparedNode, Comparison, compare
from .csr import Rows
from .endpoints import Targets, Tokens
from .faithfulness import Agreement, Faithfulness
from .graph import Graph
from .io.graph_file import GraphFileError
from .paths import Path
from .prune import Pruned
from .scores import Scores
from .show.picture import Picture
from .stability import Stability
from .supernodes import Supernode

__all__ = [
    "Agreement", "ComparedEdge", "ComparedNode", "Comparison", "Faithfulness", "Graph", "GraphFileError", "Path",
    "Picture", "Pruned", "Rows", "Scores", "Stability", "Supernode", "Targets", "Tokens", "compare",
]  # fmt: skip
