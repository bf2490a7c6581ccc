"""Automatic labels of features: the tokens that they raise, and the tokens that they are active on."""

from .automatic import add_labels, label

__all__ = ["add_labels", "label"]
