"""The model in the box, the facts it knows and the experiment that shows how it joins them."""

from .box import load_box, load_model
from .facts import Facts, Statement, facts
from .swap import swap, two_hop

__all__ = ["Facts", "Statement", "facts", "load_box", "load_model", "swap", "two_hop"]
