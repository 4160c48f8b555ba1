"""megatron-core's checkpoints: saved, loaded elsewhere, saved there, loaded again.

Model, gradients and the mock of CUDA are those of ``megatron_cases``. Whole layers are put together
by the index maps of megatron-core's optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from alto_ds.megatron import get_megatron_optimizer
from tests.cuda_on_cpu import cuda_on_cpu
from tests.sharding.harness import deviation
from tests.sharding.megatron_cases import (
    E_SETTINGS,
    LAYER_WISE,
    MEGATRON,
    MOE,
    SETTINGS,
    MegatronCase,
    Setup,
    Topology,
    assemble,
    backward,
    part_of,
    parts_of,
    set_up,
    tensor_parallel_group,
)

BEFORE, AFTER = range(3), range(3, 8)  # the steps before the checkpoint, and after it
ADAM: dict[str, Any] = {"type": "Adam"}  # the settings that stand for megatron-core's own
FILE = "file of parameter state"  # what --ckpt-format torch writes; the others are of torch_dist


@dataclass(frozen=True, kw_only=True)
class CheckpointCase(MegatronCase):
    """What is saved and loaded.

    Attributes:
        format: what is asked of megatron-core, as in the metadata of its checkpoints, or FILE.
        moves: where the checkpoint is loaded, one after the other; each saves it for the next.
        transformer_engine: let megatron-core believe that TransformerEngine is installed, which
            needs a GPU. It is a mock of that: then DistributedOptimizer asks the groups for steps.
    """

    format: str = "dp_reshardable"
    transformer_engine: bool = False
    moves: tuple[Topology, ...] = field(default_factory=tuple)


class Run(NamedTuple):
    """A model and its optimizer."""

    case: CheckpointCase
    setup: Setup
    optimizer: Any

    def train(self, steps: range) -> None:
        """Train on the global batches of these numbers."""
        for step in steps:
            self.optimizer.zero_grad()
            backward(self.setup, step)
            assert self.optimizer.step()[0]

    def save(self, path: Path) -> None:
        """As Megatron-LM does; all ranks together."""
        from megatron.core import dist_checkpointing

        _make(path)
        if self.case.format == FILE:
            if dist.get_rank() == 0:
                torch.save((self._weights(), self.optimizer.state_dict()), path / "model.pt")
            self.optimizer.save_parameter_state(str(path / "parameter state.pt"))
            dist.barrier()
        else:
            dist_checkpointing.save(self._states(is_loading=False), str(path))

    def load(self, path: Path, **options: Any) -> None:
        """As Megatron-LM does; all ranks together."""
        from megatron.core import dist_checkpointing

        groups = self._groups()
        if self.case.format == FILE:
            weights, loaded = torch.load(path / "model.pt", weights_only=False)
        else:
            states = dist_checkpointing.load(self._states(is_loading=True), str(path), **options)
            weights, loaded = states["model"], states["optimizer"]
        for name, param in self.setup.named.items():
            param.data.copy_(weights[name])
        self.optimizer.load_state_dict(loaded)
        if self.case.format == FILE:
            self.optimizer.load_parameter_state(str(path / "parameter state.pt"))
        # Layouts and schedulers hold on to them.
        assert all(now is old for now, old in zip(self._groups(), groups, strict=True))

    def _groups(self) -> list[dict[str, Any]]:
        parts = parts_of(self.optimizer)
        return [group for part in parts for group in part.optimizer.param_groups]

    def _weights(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.setup.named.items()}

    def _states(self, is_loading: bool) -> dict[str, Any]:
        model = {name: sharded(name, param) for name, param in self.setup.named.items()}
        metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
        if self.case.distributed:
            metadata["distrib_optim_sharding_type"] = self.case.format
        of_optimizer = self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        return {"model": model, "optimizer": of_optimizer}

    def snapshot(self) -> dict[str, Tensor]:
        """Master weights and states of whole layers, of which the model has rounded copies."""
        whole, differ = assemble(self.optimizer, self.setup)
        assert differ == 0
        for name, param in self.setup.named.items():
            assert torch.equal(part_of(whole["masters"][name], param).to(param), param.detach())
        return {f"{key} of {name}": w for key, ws in whole.items() for name, w in ws.items()}

    def settings(self) -> list[Any]:
        """The settings of each group on any rank, and the steps that its tensors have taken."""
        mine = [
            [
                {key: value for key, value in group.items() if key != "params"},
                {int(part.optimizer.state[tensor]["step"]) for tensor in group["params"]},
            ]
            for part in parts_of(self.optimizer)
            for group in part.optimizer.param_groups
            if group["params"]
        ]
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
        return [known for of_rank in of_ranks for known in of_rank]


def start(case: CheckpointCase) -> Run:
    """A model that has taken no step."""
    import megatron.core.optimizer
    from megatron.core import parallel_state

    gloo = case.format == FILE  # megatron-core gathers by groups of its own for that
    if gloo:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
    setup = set_up(case)
    make, settings = get_megatron_optimizer, case.settings
    if settings is ADAM:
        make, settings = megatron.core.optimizer.get_megatron_optimizer, {}
    optimizer = make(setup.config, setup.chunks, use_gloo_process_groups=gloo, **settings)
    return Run(case, setup, optimizer)


def sharded(name: str, param: Any) -> Any:
    """What megatron-core's layers say of a parameter in ``sharded_state_dict``."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    is_expert = not getattr(param, "allreduce", True)
    if is_expert:
        of_copies = parallel_state.get_expert_data_parallel_group()
    else:
        of_copies = parallel_state.get_data_parallel_group()
    group = tensor_parallel_group(param)
    cut, copy = [], 0
    if group is not None:
        cut = [(param.partition_dim, dist.get_rank(group), dist.get_world_size(group))]
    elif not is_expert:
        copy = parallel_state.get_tensor_model_parallel_rank()
    stage = int(getattr(param, "shared", False))  # the last one's copy of the embedding
    replica = (stage, copy, dist.get_rank(of_copies))
    return ShardedTensor.from_rank_offsets(name, param, *cut, replica_id=replica)


def _make(path: Path) -> None:
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What only one of both has, or is not equal to the bit."""
    names = found.keys() & expected.keys()
    return sorted(found.keys() ^ expected.keys()) + sorted(
        name for name in names if not torch.equal(found[name], expected[name])
    )


@dataclass(frozen=True)
class Other:
    """A checkpoint that is not the optimizer's own.

    Attributes:
        saves: settings of the optimizer that saves it.
        loads: settings of the one that is to load it.
        options: further fields of the case.
        load_options: of megatron-core's ``dist_checkpointing.load``.
    """

    saves: dict[str, Any]
    loads: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    load_options: dict[str, Any] = field(default_factory=dict)


class Truth(NamedTuple):
    """What the run that was not interrupted was: at the checkpoint, and after it.

    Attributes:
        saved: master weights and states of whole layers at the checkpoint.
        settings: :meth:`Run.settings` of all ranks at the checkpoint.
        after: master weights and states of whole layers after it.
    """

    saved: dict[str, Tensor]
    settings: list[Any]
    after: dict[str, Tensor]


def stay(case: CheckpointCase, path: Path) -> Truth:
    """Train, save, and train on."""
    run = start(case)
    run.train(BEFORE)
    run.save(path)
    saved, settings = run.snapshot(), run.settings()
    run.train(AFTER)
    return Truth(saved, settings, run.snapshot())


def arrive(case: CheckpointCase, path: Path, truth: Truth, next_path: Path) -> dict[str, Any]:
    """Load into a fresh optimizer, save, train on, and load again; what differs from the truth."""
    run = start(case)
    run.load(path)
    result: dict[str, Any] = {
        "loaded": differences(run.snapshot(), truth.saved),
        "settings": [str(known) for known in run.settings() if known not in truth.settings],
    }
    run.save(next_path)
    for name in ("fresh", "stepped"):
        run.train(AFTER)
        now = run.snapshot()
        result[name] = differences(now, truth.after)
        result[f"{name}, relative"] = deviation(now, truth.after)
        run.load(path)
        result[f"loaded into {name}"] = differences(run.snapshot(), truth.saved)
    sizes = {
        tuple(dist.get_process_group_ranks(group))
        for param in run.setup.named.values()
        if (group := tensor_parallel_group(param)) is not None
    }
    return result | {"tensor_parallel": max(map(len, sizes), default=1)}


def move(case: CheckpointCase, folder: Path) -> dict[str, Any]:
    """Save, and load at all places one after the other, in this launch."""
    folder = folder / name_of(case)
    with cuda_on_cpu(), transformer_engine(case.transformer_engine):
        path = folder / "first"
        truth = stay(case, path)
        found = []
        for place, topology in enumerate((case.topology, *case.moves)):
            next_path = folder / f"after move {place}"
            there = replace(case, topology=topology)
            found.append(arrive(there, path, truth, next_path))
            path = next_path
    return {"moves": found}


def reshard(case: CheckpointCase, folder: Path) -> dict[str, Any]:
    """Save in the first launch, and in each later one load what the one before has saved."""
    folder = folder / name_of(case)
    truth_path = folder / "truth.pt"
    paths = sorted(folder.glob("launch *"))
    next_path = folder / f"launch {len(paths)}"
    with cuda_on_cpu():
        if paths:
            truth = Truth(*torch.load(truth_path, weights_only=False))
            return arrive(case, paths[-1], truth, next_path)
        truth = stay(case, next_path)
        if dist.get_rank() == 0:
            torch.save(tuple(truth), truth_path)
        return {"states": len(truth.saved)}


@contextlib.contextmanager
def transformer_engine(is_installed: bool) -> Iterator[None]:
    """See ``CheckpointCase``."""
    from megatron.core.optimizer import distrib_optimizer

    with contextlib.ExitStack() as stack:
        for flag in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER") if is_installed else ():
            stack.enter_context(mock.patch.object(distrib_optimizer, flag, True))
        yield


def name_of(case: CheckpointCase) -> str:
    """The name of the case."""
    return next(name for name, known in CASES.items() if known is case)


def refuse(case: CheckpointCase, folder: Path) -> dict[str, Any]:
    """What this rank is told of checkpoints that are not its optimizer's own."""
    with cuda_on_cpu():
        found = {name: _refused(other, folder / name, case) for name, other in OTHERS.items()}
        padded = start(replace(case, topology=PP2, format="fully_reshardable"))
        return {
            "messages": found,
            "uneven": _uneven(replace(case, distributed=False), folder),
            "padded": _error(lambda: padded.save(folder / "padded")),
        }


def _refused(other: Other, folder: Path, case: CheckpointCase) -> str:
    case = replace(case, **other.options)
    saves = start(replace(case, settings=other.saves))
    saves.train(range(1))
    saves.save(folder)
    loads = start(replace(case, settings=other.loads))
    return _error(lambda: loads.load(folder, **other.load_options))


def _uneven(case: CheckpointCase, folder: Path) -> str:
    """The error where the parameters have taken different numbers of steps."""
    run = start(case)
    run.train(range(1))
    (part,) = parts_of(run.optimizer)
    next(iter(part.optimizer.state.values()))["step"] += 1
    return _error(lambda: run.save(folder / "uneven"))


def _error(call: Callable[[], None]) -> str:
    try:
        call()
    # torch's distributed checkpoint raises what is no Exception.
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


DP4, TP2, PP2, EP2 = Topology(), Topology(2), Topology(1, 2), Topology(1, 1, 2)
LAMB = SETTINGS | {"alpha": 0.0}
ROUNDED = SETTINGS | {"state_dtype": "bf16"}
SAVED: dict[str, Any] = {"measures": move, **MEGATRON}
LENIENT = {"strict": "log_all"}  # --dist-ckpt-strictness
OTHERS = {
    "Adam's into ALTO": Other(ADAM, SETTINGS),
    "Adam's into ALTO, lenient": Other(ADAM, SETTINGS, load_options=LENIENT),
    "Adam's into ALTO, file": Other(ADAM, SETTINGS, {"format": FILE}),
    "Adam's into E, lenient": Other(ADAM, E_SETTINGS, load_options=LENIENT),
    "ALTO's into LAMB": Other(SETTINGS, LAMB),
}
# On 4, 2 and 4 ranks, in a launch each.
RESHARDED: dict[str, dict[str, Any]] = {
    "alto": {},
    "rounded": {"bf16": True, "settings": ROUNDED},
    "lamb": {"bf16": True, "settings": LAMB},
    "e": {"bf16": True, "settings": E_SETTINGS},
    "tp2": {"topology": TP2},
    "experts": {"topology": EP2, "layers": MOE},
    "fully": {"format": "fully_reshardable"},
    "file": {"format": FILE},
    "fp32": {"distributed": False},
    "float16": {"distributed": False, "bf16": True},
}

CASES = {
    "saved-rounded": CheckpointCase(**SAVED, bf16=True, settings=ROUNDED),
    "saved-te": CheckpointCase(**SAVED, slow=True, bf16=True, transformer_engine=True),
    "saved-fully-e": CheckpointCase(
        **SAVED, bf16=True, settings=E_SETTINGS, format="fully_reshardable", moves=(TP2,)
    ),
    "saved-tp2": CheckpointCase(**SAVED, slow=True, topology=TP2),
    "saved-pp2": CheckpointCase(**SAVED, slow=True, bf16=True, topology=PP2),
    "saved-experts": CheckpointCase(**SAVED, slow=True, topology=EP2, layers=MOE),
    "saved-fully": CheckpointCase(**SAVED, slow=True, format="fully_reshardable", moves=(TP2, DP4)),
    "saved-fully-lamb": CheckpointCase(
        **SAVED, slow=True, settings=LAMB, format="fully_reshardable"
    ),
    "saved-file": CheckpointCase(**SAVED, slow=True, format=FILE),
    "saved-float16": CheckpointCase(
        **SAVED, slow=True, distributed=False, bf16=True, topology=TP2, moves=(DP4,)
    ),
    "saved-layer-wise": CheckpointCase(
        measures=move, **LAYER_WISE, slow=True, bf16=True, topology=TP2
    ),
    "saved-fp32": CheckpointCase(
        **SAVED, slow=True, distributed=False, settings=E_SETTINGS, moves=(TP2,)
    ),
    "saved-others": CheckpointCase(measures=refuse, **MEGATRON),
    **{
        f"resharded-{name}": CheckpointCase(
            measures=reshard, **MEGATRON, worlds=(2, 4), slow=True, **options
        )
        for name, options in RESHARDED.items()
    },
}
