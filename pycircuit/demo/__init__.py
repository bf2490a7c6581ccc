"""The model in the box, the facts it knows and what its features are named after."""

from .box import load_box, load_model
from .facts import Facts, Statement, facts

__all__ = ["Facts", "Statement", "facts", "load_box", "load_model"]
