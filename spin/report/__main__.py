"""Write <run>/report.md and its figures from the results so far; works during the run too."""

import argparse
import logging
from pathlib import Path

from spin.engine import cli
from spin.report.run import asked_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--show", action="append", default=[], metavar="TEXT", help="prompts with this text")
    with cli.errors_in_words():
        options = parser.parse_args()
        logging.getLogger("spin").info("%s", asked_report(options.run, options.show))


if __name__ == "__main__":
    main()
