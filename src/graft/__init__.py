"""graft: grow a family of language models, combine it, measure whether that helped."""

from graft import _callable, _register

__version__ = "0.1.0"
__all__ = ["__version__", *_callable.COMMANDS]

_callable.install(__name__)
_register.register_when_imported()
