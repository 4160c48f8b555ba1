"""The two passes over one fragment; kernels know nothing of distribution."""

from alto_ds.kernels.reference import StepSizes, apply_update, update_states

__all__ = ["StepSizes", "apply_update", "update_states"]
