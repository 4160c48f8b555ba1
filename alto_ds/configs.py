"""Print a DeepSpeed JSON to pre-train GPT-2 with.

.. code-block:: bash

    python -m alto_ds.configs gpt2-xl --zero 3 --batch 16384 > config.json
"""

from __future__ import annotations

from pathlib import Path

from alto_ds.pretrain import presets
from alto_ds.pretrain.options import OneLineParser
from alto_ds.pretrain.presets import Preset


def main() -> None:
    """Print the configuration that the command line asks for."""
    parser = OneLineParser(
        prog="alto_ds.configs", description="Print a DeepSpeed JSON to pre-train GPT-2 with."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", help=f"of {', '.join(presets.MICRO_BATCH_SIZES)}")
    what.add_argument("--write", type=Path, metavar="FOLDER", help="write all files of configs/")
    parser.add_argument("--zero", type=int, default=1, help="stage of ZeRO (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=int,
        default=presets.BATCH_SIZE,
        help=f"sequences of a step, up to {presets.LARGEST_BATCH_SIZE:,} (default: %(default)s)",
    )
    parser.add_argument(
        "--micro_batch",
        type=int,
        help="sequences of a rank in a micro step (default: by the model)",
    )
    parser.add_argument("--offload", action="store_true", help="keep states in the host's memory")
    parser.add_argument(
        "--optimizer", default="alto", help=f"of {', '.join(presets.OPTIMIZERS)} (default: alto)"
    )
    given = parser.parse_args()
    if given.write is not None:
        for name, config in presets.files().items():
            path = given.write / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(presets.as_text(config))
        return
    try:
        preset = Preset(
            model=given.model,
            zero=given.zero,
            batch_size=given.batch,
            offload=given.offload,
            optimizer=given.optimizer,
            micro_batch_size=given.micro_batch,
        )
    except ValueError as error:
        parser.error(str(error))
    print(presets.as_text(preset.config()), end="")


if __name__ == "__main__":
    main()
