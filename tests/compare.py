"""The one numerical rule of the test suite."""

import torch
from torch import Tensor


def assert_as_accurate_as_eager(name: str, ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """Fail unless ours is at most twice as far from the fp64 oracle as eager is, in the same dtype.

    One rounding step of the largest oracle value is always allowed: without it an eager result
    that happens to be exact would leave no room at all.
    """
    assert ours.shape == oracle.shape and ours.dtype == eager.dtype, f"{name}: {ours.shape} {ours.dtype}"
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    if not oracle.numel():
        return
    floor = torch.finfo(ours.dtype).eps * oracle.abs().max()
    error = (ours.double() - oracle).abs().max()
    allowed = 2.0 * (eager.double() - oracle).abs().max() + floor
    assert error <= allowed, f"{name}: error {error:.3e} > allowed {allowed:.3e}"
