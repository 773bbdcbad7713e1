"""graft: grow a family of language models, combine it, measure whether that helped."""

__version__ = "0.1.0"
