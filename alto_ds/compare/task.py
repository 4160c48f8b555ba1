"""What is trained in a comparison? The interface that tasks have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

PARTS = ("validation", "test")


class Parameters(NamedTuple):
    """A model's parameters, by how optimizers treat them.

    Attributes:
        hidden: matrices between the first and the last layer, with weight decay.
        outer: other layers with weight decay, such as embeddings.
        undecayed: biases and norms.
    """

    hidden: list[nn.Parameter]
    outer: list[nn.Parameter]
    undecayed: list[nn.Parameter]


class Task(Protocol):
    """A model, its data and its loss. What a seed gives is the same for every optimizer.

    Attributes:
        tokens_per_sequence: of a sequence of the batch; 1 where an example is not made of tokens.
        headline: the metric by which optimizers are compared; less is better, as of all metrics.
    """

    tokens_per_sequence: int
    headline: str

    def model(self, seed: int) -> nn.Module:
        """A model with random weights, on the CPU, in training mode."""
        ...

    def parameters(self, model: nn.Module) -> Parameters:
        """All parameters of the model."""
        ...

    def batches(self, seed: int, batch_size: int, micro_batch_size: int) -> Iterator[Any]:
        """Yield micro batches without end, in an order that depends on the seed alone."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a micro batch, a scalar in float32."""
        ...

    def evaluate(self, model: nn.Module, part: str, micro_batch_size: int) -> Mapping[str, float]:
        """Metrics over a part of :data:`PARTS`; among them "loss", by which settings are chosen."""
        ...
