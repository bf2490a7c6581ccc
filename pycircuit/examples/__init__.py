"""Example files: texts on which features are active, for pages that draw graphs."""

from .example_files import write_examples

__all__ = ["write_examples"]
