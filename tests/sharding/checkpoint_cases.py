"""PyTorch's distributed checkpoint: saved on 4 ranks, loaded on 2, saved there, loaded on 2 × 2.

No DeepSpeed. Two ranks are a device mesh of their own, and the other two another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

import alto_ds
from tests.sharding.dtensor_cases import (
    BATCH,
    SETTINGS,
    Model,
    backward,
    e_over_adamw,
    fsdp2,
    fsdp2_with_tensor_parallel,
    hsdp,
    whole_grads,
    whole_layers,
    whole_states,
)
from tests.sharding.harness import Case, deviation

BEFORE, AFTER = 3, 10  # steps before the checkpoint, and after it


Grads = dict[str, Tensor]  # of all layers, whole


class Place(NamedTuple):
    """Where the model is trained.

    Attributes:
        shard: cuts the model.
        ranks: number of ranks that load and save together.
        data_ranks: number of parts of the global batch.
        ranges: whether each rank's part of a layer is one range of it, on which the random
            numbers of rounding depend.
    """

    shard: Callable[[Model], None]
    ranks: int = 4
    data_ranks: int = 4
    ranges: bool = True


def fsdp2_of_two(model: Model) -> None:
    """Ranks 0 and 1 share one model, ranks 2 and 3 another."""
    fsdp2(model, _pairs()["pair"])


def _pairs() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "pair"))


PLACES = {
    "2": Place(fsdp2_of_two, ranks=2, data_ranks=2),
    "2 x 2, HSDP": Place(hsdp),
    "2 x 2, FSDP2 and TP": Place(fsdp2_with_tensor_parallel, data_ranks=2, ranges=False),
}


@dataclass(frozen=True, kw_only=True)
class CheckpointCase(Case):
    """What is saved and loaded.

    Attributes:
        make: makes the optimizer from the model's groups.
        rounds: whether it rounds at random, which magnifies the last bits in which gradients
            differ. Then the run that moves is given the gradients of the one that stays.
    """

    make: Callable[..., Optimizer]
    rounds: bool = False


class Run(NamedTuple):
    """A model and its optimizer at a place."""

    place: Place
    model: Model
    optimizer: Optimizer

    def train(
        self, steps: range, given: Sequence[Grads] = (), keep_grads: bool = False
    ) -> list[Grads]:
        """Train on global batches.

        Args:
            steps: numbers of the batches.
            given: gradients to take in place of the batches', whole, if any.
            keep_grads: whether to return the gradients, whole.
        """
        size = BATCH // self.place.data_ranks
        number = dist.get_rank() % self.place.ranks * self.place.data_ranks // self.place.ranks
        kept = []
        for place, step in enumerate(steps):
            backward(self.model, torch.float32, slice(number * size, (number + 1) * size), step)
            if given:
                self._replace_grads(given[place])
            if keep_grads:
                kept.append(whole_grads(self.model))
            self.optimizer.step()
        return kept

    def _replace_grads(self, grads: Grads) -> None:
        for name, param in self.model.named_parameters():
            assert isinstance(param, DTensor)
            param.grad = distribute_tensor(
                grads[name], param.device_mesh, param.placements, src_data_rank=None
            )

    def save(self, path: Path) -> None:
        """By the ranks of this place together."""
        dcp.save(self._states(), checkpoint_id=path, process_group=self._group())

    def load(self, path: Path) -> None:
        """By the ranks of this place together."""
        loaded = self._states()
        dcp.load(loaded, checkpoint_id=path, process_group=self._group())
        set_model_state_dict(self.model, loaded["model"])
        set_optimizer_state_dict(self.model, self.optimizer, loaded["optimizer"])

    def snapshot(self) -> dict[str, Tensor]:
        """All weights and states, whole."""
        return whole_layers(self.model) | whole_states(self.model, self.optimizer)

    def differences(self, snapshot: dict[str, Tensor], settings: list[dict[str, Any]]) -> list[str]:
        """Which weights, states and settings are not, to the bit, those of another run."""
        own = self.snapshot()
        names = list(own.keys() ^ snapshot.keys())
        names += [
            key for key in own.keys() & snapshot.keys() if not torch.equal(own[key], snapshot[key])
        ]
        pairs = zip(self.settings(), settings, strict=True)
        return names + [f"{ours} not {theirs}" for ours, theirs in pairs if ours != theirs]

    def settings(self) -> list[dict[str, Any]]:
        """The settings of each group, and the steps that its parameters have taken."""
        return [
            {key: value for key, value in group.items() if not key.startswith("param")}
            | {"steps": [int(self.optimizer.state[param]["step"]) for param in group["params"]]}
            for group in self.optimizer.param_groups
        ]

    def _states(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def _group(self) -> dist.ProcessGroup | None:
        return None if self.place.ranks == 4 else _pairs()["pair"].get_group()


def start(case: CheckpointCase, place: Place) -> Run:
    """A model that has taken no step."""
    model = Model()
    place.shard(model)
    return Run(place, model, case.make(model.groups(), **SETTINGS))


def run_moves(case: CheckpointCase, folder: Path) -> dict[str, Any]:
    """Train 3 steps on 4 ranks, move, and train 10 more; what differs from the run that stays."""
    stays = start(case, Place(fsdp2))
    stays.train(range(BEFORE))
    folder = folder / f"moved {case.make.__name__}"
    path = folder / "4"
    stays.save(path)
    saved, settings = stays.snapshot(), stays.settings()
    after = range(BEFORE, BEFORE + AFTER)
    grads = stays.train(after, keep_grads=case.rounds)
    found: dict[str, Any] = {}
    for name, place in PLACES.items():
        moved = start(case, place)
        moved.load(path)
        fresh = moved.differences(saved, settings)
        if place.ranks == 2:
            moved.save(folder / f"pair {dist.get_rank() // 2}")
        moved.train(after, grads)
        then = deviation(moved.snapshot(), stays.snapshot())
        moved.load(path)
        stepped = moved.differences(saved, settings)
        found[name] = {"fresh": fresh, "stepped": stepped, "then": then}
        if place.ranks == 2:
            path = folder / "pair 0"
    return found


def _bf16_states(params: Any, **settings: Any) -> alto_ds.ALTO:
    return alto_ds.ALTO(params, state_dtype="bf16", **settings)


def _lamb(params: Any, **settings: Any) -> alto_ds.ALTO:
    return alto_ds.ALTO(params, **settings | {"alpha": 0.0})


def _e_over_alto(params: Any, **settings: Any) -> alto_ds.E:
    return alto_ds.E(alto_ds.ALTO(params, **settings), alpha=-5.0, beta=0.9)


CASES: dict[str, CheckpointCase] = {
    # The states of both: s, m, v, and E's own average.
    "moved-e-over-alto": CheckpointCase(measures=run_moves, make=_e_over_alto),
    "moved-alto": CheckpointCase(measures=run_moves, make=alto_ds.ALTO, slow=True),
    "moved-lamb": CheckpointCase(measures=run_moves, make=_lamb, slow=True),
    "moved-bf16-states": CheckpointCase(
        measures=run_moves, make=_bf16_states, rounds=True, slow=True
    ),
    "moved-e-over-adamw": CheckpointCase(measures=run_moves, make=e_over_adamw, slow=True),
}
