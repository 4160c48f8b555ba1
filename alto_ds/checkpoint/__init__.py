"""Checkpoints of a DeepSpeed engine that are whole, or are not used."""

from alto_ds.checkpoint.converting import convert
from alto_ds.checkpoint.loading import load_universal
from alto_ds.checkpoint.ranks import CheckpointError
from alto_ds.checkpoint.resuming import Resumed, exist, resume
from alto_ds.checkpoint.saving import save

__all__ = ["CheckpointError", "Resumed", "convert", "exist", "load_universal", "resume", "save"]
