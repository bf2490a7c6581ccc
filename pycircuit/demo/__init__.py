"""The model in the box, the facts it knows and what its features are named after."""

from .box import load_box, load_model
from .facts import Facts, Statement

__all__ = ["Facts", "Statement", "load_box", "load_model"]
