"""Which optimizers can be compared, and how are they made of their settings?

Matrices and embeddings have weight decay, biases and norms have none. What is not set keeps the
default of the optimizer's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_optimizer
import torch
from torch.optim import Optimizer

from alto_ds import ALTO, E
from alto_ds.compare.reading import check_known
from alto_ds.compare.task import Parameters

Groups = list[dict[str, Any]]


def lamb(
    params: Groups,
    lr: float,
    betas: Sequence[float] = (0.9, 0.99),
    eps: float | Sequence[float] = (1e-6, 1e-6, 1e-10),
    weight_decay: float = 1e-4,
    bias_correction: bool = True,
    trust_clip: Sequence[float] | None = None,
) -> Optimizer:
    """LAMB (You et al., 2020): ALTO with alpha = 0. ``betas`` are those of the two moments."""
    return ALTO(
        params,
        lr=lr,
        betas=(0.99, *betas),
        alpha=0.0,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        trust_clip=trust_clip,
    )


def muon(
    params: Parameters,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adamw_lr: float | None = None,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_eps: float = 1e-10,
) -> list[Optimizer]:
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for all others, as its authors say.

    An update is scaled by 0.2 √(larger side), as Liu et al. (arXiv 2502.16982) propose, so that
    the learning rate can be AdamW's. It does not depend on which side is the input; the authors'
    own √(rows / columns) would, and GPT-2's matrices are transposed.

    Args:
        params: of the model.
        lr: learning rate.
        weight_decay: of both.
        momentum: of Muon.
        nesterov: of Muon.
        ns_steps: Newton-Schulz iterations.
        adamw_lr: learning rate of AdamW; None for the same.
        adamw_betas: of AdamW; the authors' values.
        adamw_eps: of AdamW; the authors' value.
    """
    others: Groups = [{"params": params.outer}, {"params": params.undecayed, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(
            params.hidden,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others,
            lr=lr if adamw_lr is None else adamw_lr,
            betas=(adamw_betas[0], adamw_betas[1]),
            eps=adamw_eps,
            weight_decay=weight_decay,
        ),
    ]


ALONE: dict[str, Callable[..., Optimizer]] = {
    "ALTO": ALTO,
    "LAMB": lamb,
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "Lion": pytorch_optimizer.Lion,
    "Adan": pytorch_optimizer.Adan,
    "AdaBelief": pytorch_optimizer.AdaBelief,
    "SOAP": pytorch_optimizer.SOAP,
}
# E takes "optimizer", "alpha" and "beta", and the settings of the optimizer that it names.
TYPES = (*ALONE, "Muon", "E")
OF_E = ("alpha", "beta")


def make_optimizers(kind: str, params: Mapping[str, Any], of: Parameters) -> list[Optimizer]:
    """The optimizers that step together, mostly one.

    Args:
        kind: a name of :data:`TYPES`.
        params: settings, with those that were searched for.
        of: the model's parameters.

    Raises:
        ValueError: there is no such optimizer or setting, or a value is out of its bounds.
    """
    if kind not in TYPES:
        raise ValueError(f"type={kind!r} must be one of {', '.join(TYPES)}")
    if kind == "E":
        return _corrected(params, of)
    function: Callable[..., Any] = muon if kind == "Muon" else ALONE[kind]
    # Some optimizers take any keyword, and ignore it.
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "params"
    ]
    check_known(params, names, "params")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
    try:
        if kind == "Muon":
            return function(of, **values)
        groups = [
            {"params": [*of.hidden, *of.outer]},
            {"params": of.undecayed, "weight_decay": 0.0},
        ]
        return [function(groups, **values)]
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise _refused(kind, params, error) from None


def _corrected(params: Mapping[str, Any], of: Parameters) -> list[Optimizer]:
    base = params.get("optimizer")
    if base not in TYPES or base == "E":
        raise ValueError(
            f"params.optimizer={base!r} must name E's base: one of {', '.join(TYPES[:-1])}"
        )
    own = {name: params[name] for name in OF_E if name in params}
    rest = {k: v for k, v in params.items() if k not in (*OF_E, "optimizer")}
    optimizers = make_optimizers(base, rest, of)
    try:
        return [E(optimizer, **own) for optimizer in optimizers]
    except (ValueError, TypeError) as error:
        raise _refused("E", own, error) from None


def _refused(kind: str, params: Mapping[str, Any], error: Exception) -> ValueError:
    return ValueError(f"params={dict(params)} is refused by {kind}: {' '.join(str(error).split())}")
