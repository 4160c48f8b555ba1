"""What DeepSpeed asks of ``mpu=`` and megatron-core no longer has.

.. code-block:: python

    from alto_ds.megatron import mpu
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu(), config=config, ...)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def mpu() -> Any:
    """Return megatron-core's ``parallel_state`` with DeepSpeed's names for tensor parallelism.

    Call it after ``parallel_state.initialize_model_parallel``. DeepSpeed calls "model parallel"
    what megatron-core calls "tensor model parallel".
    """
    from megatron.core import parallel_state

    names = {
        name: getattr(parallel_state, name) for name in dir(parallel_state) if name[:4] == "get_"
    }
    for what in ("group", "rank", "world_size"):
        names[f"get_model_parallel_{what}"] = names[f"get_tensor_model_parallel_{what}"]
    return SimpleNamespace(**names)
