"""ALTO and E in megatron-core: its own optimizer, and its parallel layers under DeepSpeed.

megatron-core is imported by the calls that need it, never by ``import alto_ds.megatron``.
"""

from alto_ds.megatron.deepspeed_mpu import mpu
from alto_ds.megatron.optimizer import get_megatron_optimizer

__all__ = ["get_megatron_optimizer", "mpu"]
