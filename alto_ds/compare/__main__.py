"""Compare optimizers, all treated alike: the same data, budget, schedule and number of trials.

.. code-block:: bash

    python -m alto_ds.compare comparison.yaml
"""

from __future__ import annotations

import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.options import OneLineParser

NAME = "alto_ds.compare"


def main() -> None:
    """Run the comparison that the command line names; the same command goes on after a kill."""
    parser = OneLineParser(prog=NAME, description="Compare optimizers, all treated alike.")
    parser.add_argument("spec", type=Path, help="YAML or JSON; see alto_ds/compare/README.md")
    parser.add_argument(
        "--output_dir", type=Path, help="for the results (default: runs/NAME OF THE SPEC)"
    )
    given = parser.parse_args()
    try:
        from alto_ds.compare.spec import read_spec
        from alto_ds.compare.study import compare
    except ModuleNotFoundError as error:
        parser.error(f'{error.name} is not installed; pip install "alto-ds[compare]"')
    try:
        spec = read_spec(given.spec)
        print(compare(spec, given.output_dir or Path("runs", given.spec.stem)))
    except (ValueError, OSError) as error:
        parser.error(f"{given.spec}: {error}")
    except BrokenProcessPool:
        print(
            f"{NAME}: a worker has been killed, perhaps for lack of memory; take fewer workers. "
            "The same command goes on.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{NAME}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(ExitStatus.INTERRUPTED)


if __name__ == "__main__":
    main()
