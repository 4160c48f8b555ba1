"""The model's own parameters in an optimizer's groups, which wrappers put other tensors for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from alto_ds.layout.types import Layout, Names


class OwnParameters:
    """What the groups held when the optimizer was made, and the layouts of what they hold now.

    Attributes:
        names: of the model's parameters, in the model where that is known, else
            ``param_groups.G.I``.
        groups: the parameter groups with the model's own parameters.
    """

    def __init__(self) -> None:
        self.names: dict[Tensor, str] = {}
        self.groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        # By group and tensors, with the tensors and their sizes.
        self._layouts: dict[tuple[int, ...], tuple[list[Tensor], list[int], Layout]] = {}

    def remember(self, place: int, group: dict[str, Any]) -> None:
        """Note the parameters of ``param_groups[place]``."""
        params = list(group["params"])
        names = group.get("param_names") or [
            f"param_groups.{place}.{i}" for i in range(len(params))
        ]
        self.names.update(zip(params, names, strict=True))
        self.groups.append((group, params))

    def of(self, group: dict[str, Any]) -> list[Tensor]:
        """The model's own parameters in a group; all there are where a wrapper made the group."""
        return next((params for made, params in self.groups if made is group), list(self.names))

    def layout(
        self,
        group: dict[str, Any],
        resolve: Callable[[Sequence[Tensor], Sequence[Tensor], Names], Layout],
    ) -> Layout:
        """The layout of what the group holds; ``resolve`` is asked once for the same tensors."""
        tensors = group["params"]
        key = (id(group), *map(id, tensors))
        sizes = [tensor.numel() for tensor in tensors]
        if key not in self._layouts or self._layouts[key][1] != sizes:
            layout = resolve(tensors, self.of(group), self.names)
            self._layouts[key] = (list(tensors), sizes, layout)
        return self._layouts[key][2]
