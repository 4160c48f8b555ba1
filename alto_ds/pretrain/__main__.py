"""Pre-train GPT-2 with ALTO under DeepSpeed's ZeRO, from any folder.

.. code-block:: bash

    deepspeed --module alto_ds.pretrain --deepspeed_config config.json \\
        --model gpt2-tiny --output_dir runs/tiny

``torchrun -m``, and ``python -m`` under ``mpirun`` or ``srun``, start it as well.
"""

from alto_ds.pretrain.command import main

if __name__ == "__main__":
    main()
