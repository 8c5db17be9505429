"""Cross-entropy of a linear vocabulary head, without ever holding all logits.

Source: the chunked linear cross-entropy of Hsu et al., "Liger Kernel" (2024), section 3.2: a chunk's gradient is
formed while its logits are at hand, in their place. The products are torch's; what lies between them is one kernel.

Shape suffixes: N = rows, C = rows of one chunk, D = width, V = vocabulary.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import cross_entropy

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels._common.loss_gradient import scale_gradient
from mnemos.kernels.linear import product

IGNORE = -100  # label of a row that is not scored, as in torch.nn.functional.cross_entropy
CHUNK_LOGITS = 1 << 24  # logits held at once (64 MiB in fp32)
CACHED_LOGITS = 1 << 17  # of them in fp32 in a CPU's cache (512 KiB)
BLOCK = 4096  # logits a program holds at once


# ---- reference: the definition. Any device, any dtype.
def masked_lm_loss_reference(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_N: Tensor, factor: Tensor | None = None
) -> Tensor:
    """Return the loss `masked_lm_loss` defines, all logits at once; fp64 throughout for fp64 inputs."""
    inside = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_NV = torch.addmm(bias_V.to(hidden_ND.dtype), hidden_ND, weight_VD.t()).to(inside)
    loss = cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    return loss if factor is None else loss * factor


def softmax_gradient_reference(
    logits_CV: Tensor, labels_C: Tensor, factor: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return what `launch_softmax_gradient` does, a few rows at a time, so that a CPU finds them in its cache."""
    inside = torch.promote_types(logits_CV.dtype, torch.float32)
    loss = logits_CV.new_zeros((), dtype=inside)
    rows = max(1, CACHED_LOGITS // logits_CV.shape[1])
    for logits, labels in zip(logits_CV.split(rows), labels_C[:, None].split(rows), strict=True):
        log_probs = logits.to(inside).log_softmax(-1)
        scored, label = labels != IGNORE, labels.clamp_min(0)
        loss -= log_probs.gather(1, label).masked_fill_(~scored, 0.0).sum()
        if with_grad:
            share = scored.to(inside) if factor is None else scored * factor.to(inside)
            upstream = torch.zeros_like(log_probs).scatter_(1, label, -share)
            logits.copy_(torch.ops.aten._log_softmax_backward_data(upstream, log_probs, 1, inside))
    return loss if factor is None else loss * factor, logits_CV


# ---- device code: one program per row of logits, read twice; the gradient takes the logits' place.
@triton.jit
def _softmax_gradient_kernel(
    logits_ptr,  # [C, V], rows `stride` apart; in, and the gradient out
    labels_ptr,  # [C] int64
    factor_ptr,  # [] fp32, or None
    loss_ptr,  # [C] fp32 out
    stride,
    V,
    IGNORE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    scored = label != IGNORE
    share = 1.0
    if factor_ptr is not None:
        share *= tl.load(factor_ptr)
    peak = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + place, mask=place < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    picked = tl.load(logits_ptr + label, mask=scored, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(scored, (tl.log(total) + peak - picked) * share, 0.0))
    if WITH_GRAD:
        for start in range(0, V, BLOCK):
            place = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + place, mask=place < V, other=0.0).to(tl.float32)
            grad = (tl.exp(x - peak) / total - tl.where(place == label, 1.0, 0.0)) * share
            grad = tl.where(scored, grad, 0.0)
            tl.store(logits_ptr + place, grad.to(logits_ptr.dtype.element_ty), mask=place < V)


def launch_softmax_gradient(
    logits_CV: Tensor, labels_C: Tensor, factor: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Run the device code on a chunk's logits, whose last axis is contiguous.

    Returns:
        The chunk's loss, and the tensor of the logits, which holds their gradient now where one was asked for.
    """
    launch_counts["softmax_gradient"] += 1
    C, V = logits_CV.shape
    loss_C = logits_CV.new_empty(C, dtype=torch.float32)
    _softmax_gradient_kernel[(C,)](
        logits_CV, labels_C, factor, loss_C, logits_CV.stride(0), V,
        IGNORE=IGNORE, WITH_GRAD=with_grad, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return loss_C.sum(), logits_CV


# ---- custom op: loss and gradients in one pass over the chunks; what is not asked for is empty.
def _by_chunks(
    chunk_loss: Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]],
    rows: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, D), V = hidden.shape, weight.shape[0]
    inside = torch.promote_types(hidden.dtype, torch.float32)
    with_hidden, with_weight, with_bias = wanted
    grad_hidden = hidden.new_empty((N, D) if with_hidden else 0)
    # Of one chunk the product itself will do; many are added up in fp32.
    grad_weight = hidden.new_zeros((V, D) if with_weight and min(rows, N) != N else 0, dtype=inside)
    grad_bias = hidden.new_zeros(V if with_bias else 0, dtype=inside)
    loss = hidden.new_zeros((), dtype=inside)
    # Rows of logits begin at 16-byte bounds, for the products and for the kernel.
    buffer = hidden.new_empty(0 if hidden.is_cpu else min(rows, N), triton.cdiv(V, 16) * 16)
    low_bias = bias.to(hidden.dtype)
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        hidden_CD = hidden[chunk]
        if hidden.is_cpu:
            logits_CV = product(hidden_CD, weight, low_bias)
        else:
            logits_CV = buffer[: hidden_CD.shape[0], :V]
            torch.addmm(low_bias, hidden_CD, weight.t(), out=logits_CV)
        chunk_sum, grad_CV = chunk_loss(logits_CV, labels[chunk], factor, any(wanted))
        loss += chunk_sum
        if with_bias:  # the sum of the rows as a product: a CPU adds up bf16 columns slowly
            grad_bias += (grad_CV.new_ones(1, grad_CV.shape[0]) @ grad_CV)[0]
        if with_hidden:
            if hidden.is_cpu:
                grad_hidden[chunk] = product(grad_CV, weight.t())
            else:
                torch.mm(grad_CV, weight, out=grad_hidden[chunk])
        if with_weight:
            part_VD = product(grad_CV.t(), hidden_CD.t())
            grad_weight = grad_weight.add_(part_VD) if grad_weight.numel() else part_VD
    return loss, grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@torch.library.custom_op("mnemos::masked_lm_loss", mutates_args=(), device_types="cuda")
def _masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Four times as many logits as on a CPU: they stay in the inputs' type and nothing stands beside them.
    rows = max(1, 4 * CHUNK_LOGITS // weight.shape[0])
    return _by_chunks(launch_softmax_gradient, rows, hidden, weight, bias, labels, factor, wanted)


@_masked_lm_loss.register_kernel("cpu")
def _(hidden, weight, bias, labels, factor, wanted):
    rows = max(1, CHUNK_LOGITS // weight.shape[0])
    return _by_chunks(softmax_gradient_reference, rows, hidden, weight, bias, labels, factor, wanted)


@_masked_lm_loss.register_fake
def _(hidden, weight, bias, labels, factor, wanted):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    inputs = (hidden, weight, bias)
    return (loss, *(x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[5]
    ctx.set_materialize_grads(False)  # nothing is differentiated through the gradients themselves


def _backward(ctx: Any, upstream: Tensor, *_grads_of_grads: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = []
    for grad, want in zip(ctx.saved_tensors, ctx.wanted, strict=True):
        if want:
            scale_gradient(grad, upstream)
        grads.append(grad if want else None)
    return (*grads, None, None, None)


_masked_lm_loss.register_autograd(_backward, setup_context=_setup_context)


# ---- public function: checks, then one call. The only name engine/ imports.
def masked_lm_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_N: Tensor, factor: Tensor | None = None
) -> Tensor:
    """Return factor * the sum of the cross-entropies of the scored rows.

    Every row costs its logits, scored or not: pass the selected positions only.

    Args:
        hidden_ND: inputs of the vocabulary layer, any floating type, contiguous.
        weight_VD: the vocabulary layer, same type, contiguous.
        bias_V: its bias.
        labels_N: int64, 0 to V - 1, or -100 for a row that is not scored.
        factor: fp32 scalar the loss is weighted with; None is 1.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 inputs), 0 when no row is scored; with factor 1, divide by the number of
        scored rows.

    Raises:
        ValueError: the shapes or types do not fit each other, or an input is not contiguous.
    """
    (N, D), V = hidden_ND.shape, weight_VD.shape[0]
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden is {hidden_ND.dtype}, weight {weight_VD.dtype}; bring them to one type before the call"
        )
    if weight_VD.shape != (V, D) or bias_V.shape != (V,) or labels_N.shape != (N,):
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, bias {tuple(bias_V.shape)} and "
            f"labels {tuple(labels_N.shape)} must be [N, D], [V, D], [V] and [N]"
        )
    if not all(x.is_contiguous() for x in (hidden_ND, weight_VD, bias_V, labels_N)):
        raise ValueError("every input must be contiguous; call .contiguous() where you made it")
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD, bias_V)]
    return _masked_lm_loss(hidden_ND, weight_VD, bias_V, labels_N, factor, wanted)[0]
