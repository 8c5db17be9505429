"""opcheck for ops that return a loss beside its gradient."""

from typing import Any

import torch

# Not the ahead-of-time graph: it would hand the gradient out of the graph whose backward then changes it in place. The
# public functions keep it inside; test_kernels_loss_gradient.py compiles them as a whole.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_loss_op(op: Any, args: tuple[Any, ...]) -> None:
    """Fail unless the op's schema, autograd formula and fake tensors fit what it computes."""
    torch.library.opcheck(op, args, test_utils=CHECKS)
