"""What has been trained: the model and tokenizer of a run, a checkpoint or a folder."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from alto_ds.checkpoint.deepspeed_files import read
from alto_ds.checkpoint.folders import newest_first
from alto_ds.checkpoint.verifying import problem_of_checkpoint
from alto_ds.pretrain.identity import FILE
from alto_ds.pretrain.settings import SIZES


class Trained(NamedTuple):
    """A model in evaluation mode, in float32, on the device that is here; and its tokenizer.

    Attributes:
        model: a causal language model of ``transformers``.
        tokenizer: which has an end-of-text token.
        length: tokens that it takes at most; of a run, those that it was trained on.
        source: what has been loaded, to say so.
    """

    model: PreTrainedModel
    tokenizer: Any
    length: int
    source: str


def load_trained(name: str, tokenizer: str | None = None) -> Trained:
    """Load a model.

    Args:
        name: a run's folder, of which its final model is taken, or else its newest whole
            checkpoint; one of its checkpoints; or a model of Hugging Face, a folder or a name.
        tokenizer: name or folder of another tokenizer than the model's own.

    Raises:
        ValueError: there is nothing of that kind, a checkpoint is broken, or there is no
            tokenizer.
    """
    path = Path(name)
    run = path if (path / FILE).is_file() else path.parent.parent
    if run == path and (path / "model" / "config.json").is_file():
        checkpoint, source = False, str(path / "model")
    else:
        checkpoint = (run / FILE).is_file() and (run == path or path.parent.name == "checkpoints")
        source = str(_newest_of(path) if checkpoint and run == path else name)
    default = str(run / "tokenizer") if checkpoint else source
    loaded = _load(AutoTokenizer, tokenizer or default, "tokenizer")
    if loaded.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer} has no end-of-text token; name another one")
    if checkpoint:
        model: Any = _of_checkpoint(Path(source), run, loaded.eos_token_id)
    else:
        model = _load(AutoModelForCausalLM, source, "model")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    length = model.config.max_position_embeddings
    if checkpoint or run == path:
        length = json.loads((run / FILE).read_text())["seq_length"]
    return Trained(model.float().eval().to(device), loaded, length, source)


def _load(kind: Any, name: str, what: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "; name one by --tokenizer" if what == "tokenizer" else ""
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} has no {what} that can be loaded{hint} ({reason})") from None


def _newest_of(run: Path) -> Path:
    """The newest whole checkpoint of a run."""
    folder = run / "checkpoints"
    problems: list[str] = []
    for name in newest_first(folder):
        problem = problem_of_checkpoint(folder / name)
        if problem is None:
            for line in problems:
                print(f"skipped {line}", file=sys.stderr)
            return folder / name
        problems.append(f"{name}: {problem}")
    raise ValueError(f"{folder} has no whole checkpoint" + "".join(f"; {p}" for p in problems))


def _of_checkpoint(path: Path, run: Path, end_of_text: int) -> PreTrainedModel:
    if (problem := problem_of_checkpoint(path)) is not None:
        raise ValueError(f"{path} is not whole: {problem}")
    state = _weights(path)
    said = json.loads((run / FILE).read_text())["model"]
    config = GPT2Config(
        **(SIZES[said] if isinstance(said, str) else said),
        vocab_size=len(state["transformer.wte.weight"]),
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = transformers.GPT2LMHeadModel(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # which is the embedding's
        raise ValueError(f"{path} has other layers than {FILE} says: {[*missing, *unexpected]}")
    return model


def _weights(path: Path) -> dict[str, Tensor]:
    """In float32, the master weights where there are such."""
    if any(path.glob("*_optim_states.pt")):
        # It prints what it does, and a command's output is for what was asked.
        with contextlib.redirect_stdout(sys.stderr):
            return get_fp32_state_dict_from_zero_checkpoint(str(path.parent), path.name)
    # Without ZeRO every rank has all.
    return read(path / "mp_rank_00_model_states.pt")["module"]
