"""Write report.md and its figures: of a run, with its control and what beside/ has, or of several runs.

python -m spin.report runs/tiny                                     # also during the run
python -m spin.report runs/s0 runs/s1 --names SPIN --out runs/both  # seeds of one run, and their controls
python -m spin.report runs/a runs/b DPO/evaluation --names "λ = 0.1,λ = 1,DPO" --out runs/compared
"""

import argparse
import logging
from pathlib import Path

from spin.engine import cli
from spin.report.results import evaluations, with_others
from spin.report.run import metrics, write_reports


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="directory of a run or an evaluation"
    )
    parser.add_argument("--names", default="", help="one for each, with commas, equal for seeds; or for all")
    parser.add_argument("--out", type=Path, help="where to write; by default, a single run's directory")
    with cli.errors_in_words():
        options = parser.parse_args()
        runs = options.runs
        names = options.names.split(",") if options.names or len(runs) == 1 else [run.name for run in runs]
        if len(names) not in (1, len(runs)) or (len(runs) > 1 and not all(names)):
            have = f"--names {options.names!r} for {len(runs)} runs"
            raise ValueError(f"{have}: give one for each, or one for all")
        if len(runs) > 1 and not options.out:
            raise ValueError("several runs need --out DIR, where the report is written")
        for run in runs:
            if not (evaluations(run) or metrics(run)):
                raise ValueError(f"{run}: no such run or evaluation, or it has nothing to report yet")
        named: dict[str, list[Path]] = with_others(runs, names[0]) if len(names) == 1 else {}
        for name, run in zip(names, runs if len(names) > 1 else []):
            named.setdefault(name, []).append(run)
        report = write_reports(named, options.out or runs[0])
        logging.getLogger("spin").info("%s", report)


if __name__ == "__main__":
    main()
