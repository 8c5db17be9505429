"""What the losses share: forward leaves the gradient for an upstream of 1, backward multiplies it by the upstream.

A training step's upstream is exactly 1 (every loss takes the factor it is weighted with), so that backward moves no
byte; any other upstream costs one pass in place. A second backward through the same graph is refused by autograd, because
the gradient it saved has changed.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts

BLOCK = 4096


@triton.jit
def _scale_gradient_kernel(
    grad_ptr,  # [NUM] in and out
    upstream_ptr,  # [] fp32
    num,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr)
    if upstream != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < num
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + place, (grad * upstream).to(grad_ptr.dtype.element_ty), mask=inside)


def launch_scale_gradient(grad: Tensor, upstream: Tensor) -> None:
    """Run the device code: multiply a contiguous gradient of any shape in place by the scalar `upstream`."""
    launch_counts["scale_gradient"] += 1
    _scale_gradient_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
        grad, upstream, grad.numel(), BLOCK=BLOCK, num_warps=8
    )


@torch.library.custom_op("mnemos::scale_gradient", mutates_args=("grad",), device_types="cuda")
def scale_gradient(grad: Tensor, upstream: Tensor) -> None:
    """Multiply `grad` in place by the scalar `upstream`, touching nothing where that is 1."""
    launch_scale_gradient(grad, upstream)


@scale_gradient.register_kernel("cpu")
def _(grad, upstream):
    if upstream != 1:
        grad.mul_(upstream)


@scale_gradient.register_fake
def _(grad, upstream):
    return None


def differentiate_loss(op: Any) -> None:
    """Register the backward of an op that returns (loss, gradient of its first input for an upstream of 1)."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.num_others = len(inputs) - 1
        ctx.set_materialize_grads(False)  # nothing is differentiated through the gradient itself

    def backward(ctx: Any, upstream: Tensor, _grad_of_grad: None) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        scale_gradient(grad, upstream)
        return (grad, *(None,) * ctx.num_others)

    op.register_autograd(backward, setup_context=setup_context)
