"""How sharp is the end point of a run?

By the largest eigenvalue of the Hessian, and by the loss along random directions. Both are of the
mean loss per predicted token, over some of the sequences that the run has held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from alto_ds.compare.hessian import Eigenvalue, largest_of_hessian
from alto_ds.pretrain.held_out import FILE, read_held_out
from alto_ds.pretrain.trained import load_trained

MICRO_BATCH = 8  # sequences at once
DIRECTIONS = 5
DISTANCES = tuple(step / 10 for step in range(-10, 11))


class Sharpness(NamedTuple):
    """Of a run.

    Attributes:
        source: what was loaded.
        sequences: that the loss is over.
        loss: nats per token.
        eigenvalue: the largest one of the loss's Hessian.
        distances: in units of the weights' filter norms.
        losses: for each direction, at each distance.
    """

    source: str
    sequences: int
    loss: float
    eigenvalue: Eigenvalue
    distances: Sequence[float]
    losses: Sequence[Sequence[float]]


def measure(run: Path, sequences: int, seed: int = 0) -> Sharpness:
    """Load a run's model and measure how sharp its end point is, on the device that is here.

    Args:
        run: its folder.
        sequences: of the held-out text, evenly spread; fewer where it has fewer.
        seed: of the directions and of the first vector.

    Raises:
        ValueError: there is no model or no held-out text.
    """
    if not (run / FILE).is_file():
        raise ValueError(f"--sharpness: {run} has no {FILE}, the text that a run holds out")
    trained = load_trained(str(run))
    tokens = torch.tensor(read_held_out(str(run)))
    tokens = tokens[:: max(len(tokens) // sequences, 1)][:sequences].to(trained.model.device)
    model, params = trained.model, [*trained.model.parameters()]
    generator = torch.Generator().manual_seed(seed)

    def parts() -> Iterator[Tensor]:
        for batch in tokens.split(MICRO_BATCH):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = functional.cross_entropy(logits, batch[:, 1:].flatten())
            yield loss * (len(batch) / len(tokens))

    @torch.no_grad()
    def mean_loss() -> float:
        return sum(part.item() for part in parts())

    found = largest_of_hessian(parts, params, generator)
    return Sharpness(
        source=trained.source,
        sequences=len(tokens),
        loss=mean_loss(),
        eigenvalue=found,
        distances=DISTANCES,
        losses=[
            losses_along(params, filter_normalised(model, generator), mean_loss, DISTANCES)
            for _ in range(DIRECTIONS)
        ],
    )


def filter_normalised(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """A random direction in which each filter is as long as the model's own.

    A filter is what makes one output of a layer, or the embedding of one token. Biases and norms
    are not moved: Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018).

    Args:
        model: on any device.
        generator: of normally distributed numbers, on the CPU.

    Returns:
        A tensor of its shape for each of ``model.parameters()``.
    """
    # GPT-2's layers keep their matrices as [inputs, outputs].
    transposed = {id(part.weight) for part in model.modules() if isinstance(part, Conv1D)}
    direction = []
    for param in model.parameters():
        weight = param.detach()
        if weight.ndim < 2:
            direction.append(torch.zeros_like(weight))
            continue
        inputs = [0] if id(param) in transposed else [*range(1, weight.ndim)]
        random = torch.randn(weight.shape, generator=generator).to(weight)
        scale = weight.norm(dim=inputs, keepdim=True) / random.norm(dim=inputs, keepdim=True)
        direction.append(random * scale)
    return direction


def losses_along(
    params: Sequence[nn.Parameter],
    direction: Sequence[Tensor],
    loss: Callable[[], float],
    distances: Sequence[float],
) -> list[float]:
    """The loss at weights + distance · direction, for each distance; the weights stay as they are.

    Args:
        params: the weights.
        direction: a tensor for each.
        loss: computes it for the weights of the moment.
        distances: from where they are.
    """
    found = []
    with _restored(params) as weights:
        for distance in distances:
            for param, weight, along in zip(params, weights, direction, strict=True):
                param.copy_(weight + distance * along)
            found.append(loss())
    return found


@contextmanager
def _restored(params: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    weights = [param.detach().clone() for param in params]
    with torch.no_grad():
        try:
            yield weights
        finally:
            for param, weight in zip(params, weights, strict=True):
                param.copy_(weight)
