"""Make a page of a comparison, or of runs.

.. code-block:: bash

    python -m alto_ds.report runs/comparison
    python -m alto_ds.report runs/alto runs/adamw --sharpness --output_dir runs/page
"""

from __future__ import annotations

from pathlib import Path

from alto_ds.pretrain.options import OneLineParser
from alto_ds.report.page import write_page
from alto_ds.report.reading import FILE, read_studies
from alto_ds.report.sharpness import measure

NAME = "alto_ds.report"


def main() -> None:
    """Write the page that the command line asks for, and print its path."""
    parser = OneLineParser(prog=NAME, description="Make a page of a comparison, or of runs.")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="output folders of alto_ds.compare or alto_ds.pretrain",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="for the page (default: report in the first folder)"
    )
    parser.add_argument(
        "--sharpness", action="store_true", help="of each run's end point; takes time"
    )
    parser.add_argument(
        "--sharpness_sequences",
        type=int,
        default=64,
        help="held-out sequences for that (default: %(default)s)",
    )
    given = parser.parse_args()
    try:
        if given.sharpness_sequences < 1:
            raise ValueError(
                f"--sharpness_sequences={given.sharpness_sequences} must be at least 1"
            )
        studies = read_studies(given.folders)
        runs = [folder for folder in given.folders if (folder / FILE).is_file()]
        if given.sharpness and not runs:
            raise ValueError(
                "--sharpness needs a run of alto_ds.pretrain; a comparison keeps no weights: write "
                "sharpness: 256 into its file"
            )
        measured = {
            str(folder): measure(folder, given.sharpness_sequences)
            for folder in (runs if given.sharpness else [])
        }
        page = write_page(studies, measured, given.output_dir or given.folders[0] / "report")
    except (ValueError, OSError) as error:
        parser.error(f"{error}")
    print(page)


if __name__ == "__main__":
    main()
