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
        is_told: a layout was told, which nobody else could find.
    """

    def __init__(self) -> None:
        self.names: dict[Tensor, str] = {}
        self.groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        self.is_told = False
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
        known = self._layouts.get(_key(group))
        if known is not None and known[1] == _sizes(tensors):
            return known[2]
        layout = resolve(tensors, self.of(group), self.names)
        self._note(group, layout)
        return layout

    def tell(self, group: dict[str, Any], layout: Layout) -> None:
        """Note the layout of what the group holds now, so that nobody is asked for it."""
        self._note(group, layout)
        self.is_told = True

    def _note(self, group: dict[str, Any], layout: Layout) -> None:
        tensors = group["params"]
        self._layouts[_key(group)] = (list(tensors), _sizes(tensors), layout)


def _key(group: dict[str, Any]) -> tuple[int, ...]:
    return (id(group), *map(id, group["params"]))


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.numel() for tensor in tensors]
