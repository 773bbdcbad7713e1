"""graft: grow a family of language models, combine it, measure whether that helped."""

import logging
import os

from graft import _callable, _register

# Threads that wait for each other's part of a small operation sleep instead of spinning: with another process on the
# same cores, spinning makes training twenty times slower. Read by OpenMP when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# bitsandbytes warns on every import of a kernel that it can do without, and in every call of a layer in 8 bits of how
# these compute (docs/tuning.md)
for _name in ("backends.cpu.ops", "autograd._functions"):
    logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__", *_callable.COMMANDS]

_callable.install(__name__)
_register.register_when_imported()
