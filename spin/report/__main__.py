"""Write report.md and its figures: of a run, with its control and what beside/ has, or of several runs.

python -m spin.report runs/tiny                                     # also during the run
python -m spin.report runs/s0 runs/s1 --names SPIN --out runs/both  # seeds of one run, and their controls
python -m spin.report runs/a runs/b DPO/evaluation --names "λ = 0.1,λ = 1,DPO" --out runs/compared
"""

import argparse
import logging
from pathlib import Path

from spin.engine import cli
from spin.report.results import with_others
from spin.report.run import check_results, write_reports


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run or an evaluation: its directory"
    )
    parser.add_argument(
        "--names", default="", help="one for each, with commas, equal for seeds; or one for all"
    )
    parser.add_argument("--out", type=Path, help="where to write; for a single run, it is the run by default")
    with cli.errors_in_words():
        options = parser.parse_args()
        runs, names = options.runs, options.names.split(",")
        if len(names) == 1 and (names[0] or len(runs) == 1):
            named = with_others(runs, names[0])
        elif len(names) != len(runs):
            have = f"{len(names)} names for {len(runs)} runs" if names[0] else f"{len(runs)} runs need names"
            raise ValueError(f"{have}: --names a,b,… has one for each, or one for all, which are its seeds")
        else:
            named = {}
            for name, run in zip(names, runs):
                named.setdefault(name, []).append(run)
        if len(runs) > 1 and not options.out:
            raise ValueError("several runs need --out DIR, where the report is written")
        for run in runs:
            check_results(run)
        report = write_reports(named, options.out or runs[0])
        logging.getLogger("spin").info("%s", report)


if __name__ == "__main__":
    main()
