"""What every command line of ours does with a mistake: one sentence, an exit code, no traceback."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from mnemos.sharding.errors import DataError, UserError

USER_MISTAKE, BAD_DATA, TRY_AGAIN, INTERRUPTED = 2, 65, 75, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint with where to read on."""
        raise UserError(f"{message}; `{self.prog} --help` shows the command with examples")


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done; 2 the user's mistake; 65 data bad beyond the set rate; 75 the machine's trouble (disk full, a
    worker killed), worth another try; 130 interrupted. Anything else is our bug and keeps its traceback.
    """
    previous = signal.signal(signal.SIGTERM, _as_interrupt)  # so that cleaning up happens then, too
    try:
        command(argv)
    except UserError as error:
        return _say(error, USER_MISTAKE)
    except DataError as error:
        return _say(error, BAD_DATA)
    except OSError as error:
        return _say(
            f"the machine refused: {error}; nothing was written, start the same command again", TRY_AGAIN
        )
    except KeyboardInterrupt:
        return _say("interrupted; nothing was written", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _as_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _say(what: object, code: int) -> int:
    print("error:", " ".join(str(what).split()), file=sys.stderr)
    return code
