"""Launch settings shared by the kernels, and the count that proves device code ran."""

from collections import Counter

import torch
import triton

MAX_ROW = 16384  # one program holds one row in registers; past this it spills
# Measured on an H200 for rows of 768 and 4096: with fewer values a thread, warps wait for each other's sums.
VALUES_PER_THREAD = 32
INTERPRETED_PROGRAMS = 3  # without a GPU: few enough to be quick, enough to split the rows unevenly

# Launches of device code so far in this process, by the name of the launch function without "launch_".
launch_counts: Counter[str] = Counter()


def row_launch(num_values: int) -> tuple[int, int]:
    """Return (block, num_warps) for a kernel that works on a row of `num_values` at once.

    Raises:
        ValueError: the row is longer than one program may hold.
    """
    if num_values > MAX_ROW:
        raise ValueError(f"row of {num_values} values is longer than the {MAX_ROW} one program may hold")
    block = triton.next_power_of_2(num_values)
    return block, min(16, max(1, block // (32 * VALUES_PER_THREAD)))


def num_programs(device: torch.device, most: int, *, each: int) -> int:
    """Return how many programs share the rows of a kernel that adds up over them: at least 1, at most `most`.

    Args:
        device: where the kernel runs.
        most: rows, or tiles of rows.
        each: programs that fit one multiprocessor at once.
    """
    if device.type == "cuda":
        fits = torch.cuda.get_device_properties(device).multi_processor_count * each
    else:
        fits = INTERPRETED_PROGRAMS
    return max(1, min(most, fits))
