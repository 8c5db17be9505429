"""What every command line of ours does with a mistake: one sentence, an exit code, no traceback."""

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NoReturn

from mnemos.sharding.errors import DataError, UserError

USER_MISTAKE, BAD_DATA, TRY_AGAIN, INTERRUPTED = 2, 65, 75, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint with where to read on."""
        raise UserError(f"{message}; `{self.prog} --help` shows the command with examples")


def check_ranges(shares: Mapping[str, float], workers: int) -> None:
    """Raise UserError for a share outside 0 to below 1, by its flag, or a negative number of --workers."""
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{name} is {value:g}; a share from 0 to below 1 is allowed")
    if workers < 0:
        raise UserError(f"--workers is {workers}; 0 (one per core) or more is allowed")


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done; 2 the user's mistake; 65 data bad beyond the set rate; 75 the machine's trouble (disk full, a
    worker killed), worth another try; 130 interrupted. Anything else is our bug and keeps its traceback.
    What a command keeps of work it could not finish it says in a note of the exception.
    """
    previous = signal.signal(signal.SIGTERM, _as_interrupt)  # so that cleaning up happens then, too
    try:
        command(argv)
    except UserError as error:
        return _say(USER_MISTAKE, str(error), _kept(error))
    except DataError as error:
        return _say(BAD_DATA, str(error), _kept(error))
    except OSError as error:
        kept = _kept(error) or "nothing was written, start the same command again"
        return _say(TRY_AGAIN, f"the machine refused: {error}", kept)
    except KeyboardInterrupt as error:
        return _say(INTERRUPTED, "interrupted", _kept(error) or "nothing was written")
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _as_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _kept(error: BaseException) -> str:
    """Return what the command says it keeps, "" where it says nothing."""
    return " ".join(getattr(error, "__notes__", []))


def _say(code: int, *parts: str) -> int:
    sentence = "; ".join(part for part in parts if part)
    print("error:", " ".join(sentence.split()), file=sys.stderr)
    return code
