"""The command line that the scripts share."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager

from spin.engine.distributed import lost_rank
from spin.engine.recipe import Recipe
from spin.engine.signals import Stopped

log = logging.getLogger("spin")
EPILOG = "Any setting of spin/config.py can be given as --section.key=value, e.g. --train.lr=1e-7."


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with --config; other arguments are taken for settings."""
    result = argparse.ArgumentParser(description=description, epilog=EPILOG, allow_abbrev=False)
    result.add_argument("--config", default="configs/tiny.toml", help="recipe (default: configs/tiny.toml)")
    return result


def parse(
    arguments: argparse.ArgumentParser, argv: Sequence[str] | None = None, more: Sequence[str] = ()
) -> tuple[argparse.Namespace, Recipe]:
    """The parsed arguments, and the recipe with their overrides and `more`."""
    known, overrides = arguments.parse_known_args(argv)
    forked = [f"--run.fork={known.fork}"] if getattr(known, "fork", None) else []
    return known, Recipe(known.config, [*overrides, *forked, *more])


def iterations(text: str, base: bool = False) -> list[int]:
    """[0, 1, 2, 5] from "5,0-2", in ascending order; with `base`, "base" stands for -1. Raises ValueError."""
    result: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if base and part == "base":
            result.add(-1)
        elif first.isdigit() and last.isdigit() and len(last) <= 4 and int(first) <= int(last):
            result.update(range(int(first), int(last) + 1))
        else:
            raise ValueError(
                f"--iter {text}: give a number up to 9999, a range or several, as in 0 or 0-2 or "
                f"{'base,' * base}0,3"
            )
    return sorted(result)


@contextmanager
def errors_in_words():
    """Show errors that a user can solve as one line; log to standard error, from the first rank only."""
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("stopped; run the same command again to resume") from None
    except Stopped as stopped:
        log.info(stopped)
        raise SystemExit(143) from None  # as a process that a signal ended
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        log.warning("rank %s: another rank has ended, see its error, or is unreachable (%s)", rank, reason)
        time.sleep(10)  # torchrun reports the rank that ended first, and ends the others meanwhile
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        name = f" (rank {rank})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        raise SystemExit(f"error{name}: {error}") from None
