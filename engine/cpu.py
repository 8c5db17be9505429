"""What a run on a CPU needs of the machine: cores of its own, and memory that stays."""

import ctypes
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, "microseconds period" or "max period"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def use_cores(ranks: int) -> None:
    """Give this rank its share of the cores, unless the user chose the number of threads by OMP_NUM_THREADS.

    Args:
        ranks: on this machine.
    """
    import torch

    if not _user_chose_threads(ranks):
        torch.set_num_threads(max(1, num_cores() // ranks))


def _user_chose_threads(ranks: int) -> bool:
    given = os.environ.get("OMP_NUM_THREADS")
    if given == "1" and ranks > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        return False  # torchrun sets it for several ranks, however many cores there are
    return given is not None


def num_cores() -> int:
    """Return the cores this process may use: those it is bound to, or fewer where its container has a quota of time."""
    cores = len(os.sched_getaffinity(0))
    try:
        time, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if time == "max" else max(1, min(cores, int(time) // int(period)))


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that were freed; else each step asks the kernel for all its memory anew."""
    change = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    if change is not None:
        change(_M_MMAP_MAX, 0)
        change(_M_TRIM_THRESHOLD, (1 << 31) - 1)
