"""Pre-train GPT-2 with ALTO under DeepSpeed's ZeRO, from any folder.

.. code-block:: bash

    deepspeed --module alto_ds.pretrain --deepspeed_config config.json \\
        --model gpt2-tiny --output_dir runs/tiny

``torchrun -m``, and ``python -m`` under ``mpirun`` or ``srun``, start it as well.
"""

from __future__ import annotations

import os
import sys

from alto_ds.pretrain import environment
from alto_ds.pretrain.exits import ExitStatus


def main() -> None:
    """Look at the environment, then run the command on this rank and end the process."""
    wrong = environment.problem(os.environ) or environment.problem_of_accelerator(os.environ)
    if wrong is not None:
        if environment.is_first_of_node(os.environ):
            print(f"alto_ds.pretrain: error: {wrong}.", file=sys.stderr)
        sys.exit(ExitStatus.REFUSED)
    from alto_ds.pretrain import command  # imports what reads the environment

    command.main()


if __name__ == "__main__":
    main()
