"""A model whose gradients are known, and the yardstick: an optimizer on its whole layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LinearModel(nn.Module):
    """Layers of many sizes whose gradients are known: the loss is linear in the weights.

    The gradient of sample i is a tensor of multiples of 1/8, the same on any rank, so that
    averages over powers of two are exact in any order. ``tied`` is used twice, ``dead`` never,
    ``zero`` starts with norm 0, ``frozen`` needs no gradient, ``lone`` is a group of one element.
    """

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "matrix": (37, 11),
        "scalar": (1,),
        "thin": (64, 3),
        "dead": (7,),
        "zero": (3, 3),
        "vector": (129,),
        "frozen": (10,),
        "tied": (6, 9),
        "bias": (13,),
        "norm": (1,),
        "lone": (1,),
    }
    NO_DECAY = ("bias", "norm")
    overflows = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1234)
        for name, shape in self.SHAPES.items():
            value = torch.randn(shape, generator=generator) * (0.0 if name == "zero" else 0.5)
            self.register_parameter(name, nn.Parameter(value, requires_grad=name != "frozen"))

    def groups(self) -> list[dict[str, Any]]:
        """Decayed parameters, others at another learning rate, and a group of one element."""
        named = dict(self.named_parameters())
        lone = named.pop("lone")
        return [
            {"params": [p for n, p in named.items() if n not in self.NO_DECAY]},
            {"params": [named[n] for n in self.NO_DECAY], "weight_decay": 0.0, "lr": 0.01},
            {"params": [lone]},
        ]

    @classmethod
    @functools.cache
    def sum_of_gradients(cls, samples: range) -> dict[str, Tensor]:
        """Sum of the gradients of the samples' losses for each layer, exact in float32."""
        sums = {name: torch.zeros(shape) for name, shape in cls.SHAPES.items()}
        for sample in samples:
            generator = torch.Generator().manual_seed(sample)
            for total in sums.values():
                total += torch.randint(-8, 9, total.shape, generator=generator) / 8
        return sums

    @classmethod
    def clipped_gradients(cls, samples: range, clipping: float) -> dict[str, Tensor]:
        """Mean gradient over ``samples``, clipped as a whole: what the optimizer must receive."""
        mean = {n: grad / len(samples) for n, grad in cls.sum_of_gradients(samples).items()}
        del mean["frozen"]
        mean["dead"] = torch.zeros_like(mean["dead"])
        norm = torch.stack([grad.norm() for grad in mean.values()]).norm()
        return {name: grad * min(1.0, clipping / norm.item()) for name, grad in mean.items()}

    @classmethod
    def group_of(cls, name: str) -> int:
        """Index of the parameter's group in :meth:`groups`."""
        return 1 if name in cls.NO_DECAY else 2 if name == "lone" else 0

    def forward(self, samples: range) -> Tensor:
        """Mean loss of ``samples``."""
        losses = []
        for name, grad in self.sum_of_gradients(samples).items():
            param = getattr(self, name)
            if name == "tied":
                half = grad.to(param) / 2
                losses += [(param * half).sum(), (half * param).sum()]
            elif name not in ("dead", "frozen"):
                losses.append((param * grad.to(param)).sum())
        loss = torch.stack(losses).sum() / len(samples)
        return loss * float("inf") if self.overflows else loss


class Yardstick:
    """An optimizer on whole float32 layers in one process.

    Args:
        masters: the layers' weights at the start, by their names; copied.
        make: makes the optimizer from groups of named parameters.
    """

    def __init__(self, masters: Mapping[str, Tensor], make: Callable[[Any], Optimizer]) -> None:
        self._params = {name: nn.Parameter(value.clone()) for name, value in masters.items()}
        self.optimizer: Any = make(
            [
                {"params": [(n, p)]} | ({"weight_decay": 0.0} if n in LinearModel.NO_DECAY else {})
                for n, p in self._params.items()
            ]
        )

    def step(self, grads: dict[str, Tensor], lr: list[float]) -> None:
        """Update the layers that have a gradient; ``lr`` is that of each group of the model."""
        for group in self.optimizer.param_groups:
            (name,) = group["param_names"]
            self._params[name].grad = grads.get(name)
            group["lr"] = lr[LinearModel.group_of(name)]
        self.optimizer.step()

    def masters(self) -> dict[str, Tensor]:
        """The weights now."""
        return {name: param.detach() for name, param in self._params.items()}

    def states(self, key: str) -> dict[str, Tensor]:
        """One state of each layer that has it."""
        states = {name: self.optimizer.state[param] for name, param in self._params.items()}
        return {name: state[key] for name, state in states.items() if key in state}
