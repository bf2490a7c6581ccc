"""Files that show where features are active, for pages that draw graphs."""

from .example_files import write_examples

__all__ = ["write_examples"]
