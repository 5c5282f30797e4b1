"""Write <run>/report.md and its figures from what is there, also while the run is at work."""

import argparse
import logging
from pathlib import Path

from spin.engine import cli
from spin.report.run import asked_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory, also of one at work")
    parser.add_argument(
        "--show", action="append", default=[], metavar="TEXT", help="show the prompts that contain this"
    )
    with cli.errors_in_words():
        options = parser.parse_args()
        logging.getLogger("spin").info("%s", asked_report(options.run, options.show))


if __name__ == "__main__":
    main()
