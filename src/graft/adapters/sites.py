"""The modules of one adapter, or of all of a model, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class Sites(nn.Module):
    """Modules by any name: `nn.ModuleDict` refuses those of its own methods, such as `keys`."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def items(self) -> list[tuple[str, Any]]:
        """Names with their modules, in order."""
        return list(self._modules.items())

    def values(self) -> list[Any]:
        """The modules, in order."""
        return list(self._modules.values())
