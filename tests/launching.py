"""Start a script on several ranks, also while other runs go on beside it on the same machine."""

import socket
import sys
from pathlib import Path


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_command(script: Path, *, ranks: int | None) -> list[str]:
    """Return the launcher's command for a script; None leaves the number of ranks to the launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    number = [] if ranks is None else ["--num_gpus", str(ranks)]
    return [str(launcher), "--master_port", str(free_port()), *number, str(script)]
