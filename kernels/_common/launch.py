"""Launch settings shared by the kernels that hold one row in registers."""

import triton

MAX_ROW = 16384  # one program holds one row in registers; past this it spills
# Measured on an H200 for rows of 768 and 4096: with fewer values a thread, warps wait for each other's sums.
VALUES_PER_THREAD = 32


def row_launch(num_values: int) -> tuple[int, int]:
    """Return (block, num_warps) for a kernel that works on a row of `num_values` at once.

    Raises:
        ValueError: the row is longer than one program may hold.
    """
    if num_values > MAX_ROW:
        raise ValueError(f"row of {num_values} values is longer than the {MAX_ROW} one program may hold")
    block = triton.next_power_of_2(num_values)
    return block, min(16, max(1, block // (32 * VALUES_PER_THREAD)))
