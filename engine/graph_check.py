"""Whether a graph gives what the step gives without: on a batch and with weights that it was not made with."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mnemos.sharding.stream import RawBatch

TENSORS = ("data", "scale_B", "shift_B", "place_B")  # of a batch
# How far a replay's loss and gradients may be from the eager ones, as a share of their norm. The kernels are the same, but
# some add up in any order: then single values round otherwise. A graph that reads old weights differs by about CHANGE.
TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7, torch.float32: 2.0**-10}
CHANGE = 0.25  # share of every weight added for the comparison
FAINT = 2.0**-10  # share of the largest gradient norm below which a gradient may be nothing but rounding


@contextlib.contextmanager
def changed(parameters: Sequence[Tensor], raw: RawBatch) -> Iterator[None]:
    """Change weights and batch in place for a while: what a graph must read anew. All come back bit for bit."""
    tensors = [*parameters, *(getattr(raw, name) for name in TENSORS)]
    with torch.no_grad():
        saved = [tensor.clone() for tensor in tensors]
        for parameter in parameters:
            parameter.mul_(1.0 + CHANGE)
        for name in TENSORS:
            getattr(raw, name).copy_(getattr(raw, name).roll(1, 0))
        try:
            with torch.enable_grad():
                yield
        finally:
            torch._foreach_copy_(tensors, saved)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """Return in which way a replay's loss (the first) and gradients are not those expected; "" where they are. Waits."""
    pairs = zip(found, expected, strict=True)
    gaps = torch.stack([torch.linalg.vector_norm(new.float() - old.float()) for new, old in pairs])
    norms = torch.stack([torch.linalg.vector_norm(old.float()) for old in expected])
    measured: list[list[float]] = torch.stack([gaps, norms], 1).tolist()
    faint = FAINT * max((norm for _, norm in measured[1:]), default=0.0)
    for number, (gap, norm) in enumerate(measured):
        if not gap <= tolerance * (norm + (faint if number else 0.0)):  # so written, NaN differs
            what = f"the gradient of a parameter {tuple(expected[number].shape)}" if number else "its loss"
            return f"{what} differs by {gap:.3g} of {norm:.3g} from that computed without"
    return ""
