"""The demo model, the facts that it was taught, and the names of its features."""

from .demo_model import load_demo, load_model
from .facts import Facts, Statement

__all__ = ["Facts", "Statement", "load_demo", "load_model"]
