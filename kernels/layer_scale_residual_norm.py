"""Residual with DropPath and LayerScale, then LayerNorm: the memory-bound half of a block, one pass each way.

Sources: Touvron et al., "Going deeper with Image Transformers" (2021), section 2.2 (LayerScale); Huang et al., "Deep
Networks with Stochastic Depth" (2016); Ba et al., "Layer Normalization" (2016).
The norm is that of the residual stream as it is stored, after rounding: backward reads nothing else, and so
differentiates exactly what forward did.

Shape suffixes: B = runs of equally many rows (samples, or single tokens), R = rows, D = width, N = programs.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import VALUES_PER_THREAD, launch_counts, num_programs

MAX_WIDTH = 4096  # past this the sums that backward holds in registers spill
MAX_WARPS = 16  # of a program, and of all a multiprocessor's programs in backward
Maybe = Tensor | None


# ---- reference: the definition. Any device, any dtype; autograd differentiates it. CPU runs use it.
def layer_scale_residual_norm_reference(
    x: Tensor, branch: Tensor, scale: Maybe, keep: Maybe, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x_new, normed, mean [R], rstd [R]) in plain PyTorch; statistics fp32, fp64 for an fp64 x."""
    inside = torch.promote_types(x.dtype, torch.float32)
    factor = scale
    if keep is not None:
        factor = _per_row(keep, x) if scale is None else _per_row(keep, x) * scale
    x_new = x + branch if factor is None else torch.addcmul(x, branch, factor.to(x.dtype))
    parameters = (weight.to(inside), bias.to(inside))
    # A CPU normalises half precision as it lies; the gradient of that would add up in half precision, too.
    source = x_new if x_new.is_cpu and not torch.is_grad_enabled() else x_new.to(inside)
    normed, mean, rstd = torch.native_layer_norm(source, weight.shape, *parameters, eps)
    return x_new, normed.to(x.dtype), mean.view(-1), rstd.view(-1)


def backward_reference(grad_x_new, grad_normed, x_new, branch, scale, keep, weight, mean, rstd):
    """Return what `launch_layer_scale_residual_norm_backward` does, in plain PyTorch."""
    inside = mean.dtype
    statistics = [statistic.view(*x_new.shape[:-1], 1) for statistic in (mean, rstd)]
    parameters = [weight.to(inside)] * 2  # the offset's values are not read
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(inside), x_new.to(inside), weight.shape, *statistics, *parameters, [True] * 3
    )
    grad_x = grad if grad_x_new is None else grad + grad_x_new
    kept = grad_x if keep is None else grad_x * _per_row(keep, x_new)
    grad_branch = x_new.new_empty(0) if kept is grad_x else kept
    grad_scale = x_new.new_empty(0)
    if scale is not None:
        grad_branch = kept * scale
        grad_scale = (kept * branch).flatten(0, -2).sum(0).to(scale.dtype)
    grads = (grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))
    return grad_x.to(x_new.dtype), grad_branch.to(x_new.dtype), grad_scale, *grads


def _per_row(keep: Tensor, x: Tensor) -> Tensor:
    """Return keep in a shape that meets the rows of x."""
    if keep.numel() != x.shape[0]:
        keep = keep.repeat_interleave(x.shape[:-1].numel() // keep.numel()).view(x.shape[:-1])
    return keep.view(*keep.shape, *(1,) * (x.ndim - keep.ndim))


# ---- device code: tiles of whole rows, fp32 inside, one cast at the store. A None pointer leaves its part out.
@triton.jit(do_not_specialize=["num_rows", "run"])
def _layer_scale_residual_norm_kernel(
    x_ptr, branch_ptr,  # [R, D]
    scale_ptr,  # [D], or None
    keep_ptr,  # [B] fp32, or None
    weight_ptr, bias_ptr,  # [D]
    x_new_ptr, normed_ptr,  # [R, D] out
    mean_ptr, rstd_ptr,  # [R] fp32 out
    num_rows, run, eps,  # run: rows that share a keep
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row, is_column = row < num_rows, column < D
    inside = is_row[:, None] & is_column[None, :]
    start = tl.program_id(0).to(tl.int64) * (ROWS * D)  # R * D passes 2**31 for a large batch
    offset = tl.arange(0, ROWS)[:, None] * D + column[None, :]

    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        branch *= tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if keep_ptr is not None:
        branch *= tl.load(keep_ptr + row // run, mask=is_row, other=0.0)[:, None]
    stored = (x + branch).to(x_new_ptr.dtype.element_ty)
    tl.store(x_new_ptr + start + offset, stored, mask=inside)
    x_new = stored.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0)[None, :]
    bias = tl.load(bias_ptr + column, mask=is_column, other=0.0)[None, :]
    mean = tl.sum(x_new, 1) / D
    centred = tl.where(is_column[None, :], x_new - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(rstd_ptr + row, rstd, mask=is_row)
    normed = centred * rstd[:, None] * weight.to(tl.float32) + bias.to(tl.float32)
    tl.store(normed_ptr + start + offset, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "run"])
def _layer_scale_residual_norm_backward_kernel(
    grad_x_new_ptr,  # [R, D], or None
    grad_normed_ptr, x_new_ptr,  # [R, D]
    branch_ptr,  # [R, D], or None
    scale_ptr,  # [D], or None
    keep_ptr,  # [B] fp32, or None
    weight_ptr,  # [D]
    mean_ptr, rstd_ptr,  # [R] fp32
    grad_x_ptr,  # [R, D] out
    grad_branch_ptr,  # [R, D] out, or None: the same as grad_x
    sums_ptr,  # [N, 3 or 2, D] fp32 out: this program's part of the gradients of weight, bias and scale
    num_rows, run,  # run: rows that share a keep
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    is_column = column < D
    offset = tl.arange(0, ROWS)[:, None] * D + column[None, :]
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]

    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        is_row = row < num_rows
        inside = is_row[:, None] & is_column[None, :]
        start = tile * tl.full([], ROWS * D, tl.int64)  # R * D passes 2**31 for a large batch
        mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)[:, None]
        x_new = tl.load(x_new_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad_normed_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)

        unit = (x_new - mean) * rstd  # anything past the last column, where upstream is 0
        weight_sum += upstream * unit
        bias_sum += upstream
        upstream *= weight
        along = tl.sum(upstream * unit, 1)[:, None] * (1.0 / D)
        grad = (upstream - tl.sum(upstream, 1)[:, None] * (1.0 / D) - unit * along) * rstd
        if grad_x_new_ptr is not None:
            grad += tl.load(grad_x_new_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)

        if grad_branch_ptr is not None:
            if keep_ptr is not None:
                grad *= tl.load(keep_ptr + row // run, mask=is_row, other=0.0)[:, None]
            if scale_ptr is not None:
                branch = tl.load(branch_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
                scale_sum += grad * branch
                grad *= scale
            tl.store(grad_branch_ptr + start + offset, grad.to(grad_branch_ptr.dtype.element_ty), mask=inside)

    KINDS: tl.constexpr = 2 if scale_ptr is None else 3
    sums_ptr += tl.program_id(0) * (KINDS * D)
    tl.store(sums_ptr + column, tl.sum(weight_sum, 0), mask=is_column)
    tl.store(sums_ptr + D + column, tl.sum(bias_sum, 0), mask=is_column)
    if scale_ptr is not None:
        tl.store(sums_ptr + 2 * D + column, tl.sum(scale_sum, 0), mask=is_column)


# One launch adds the programs' sums up and rounds each to its parameter's type.
@triton.jit(do_not_specialize=["num_rows"])
def _sum_over_programs_kernel(
    sums_ptr,  # [N, 3 or 2, D] fp32
    grad_weight_ptr, grad_bias_ptr,  # [D] out
    grad_scale_ptr,  # [D] out, or empty
    num_rows,  # N
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    kind = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < D
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, num_rows, ROWS, num_stages=3):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & is_column[None, :]
        offset = (row[:, None] * tl.num_programs(1) + kind) * D + column[None, :]
        total += tl.load(sums_ptr + offset, mask=inside, other=0.0)
    grad = tl.sum(total, 0)
    if kind == 0:
        tl.store(grad_weight_ptr + column, grad.to(grad_weight_ptr.dtype.element_ty), mask=is_column)
    elif kind == 1:
        tl.store(grad_bias_ptr + column, grad.to(grad_bias_ptr.dtype.element_ty), mask=is_column)
    else:
        tl.store(grad_scale_ptr + column, grad.to(grad_scale_ptr.dtype.element_ty), mask=is_column)


def _tiles(x: Tensor, keep: Maybe, *, least: int, values_per_thread: int) -> dict[str, int]:
    """Return how a launch cuts x into tiles: one row, or narrow rows up to `least` values."""
    num_rows, D = x.shape[:-1].numel(), x.shape[-1]
    block = triton.next_power_of_2(D)
    rows = max(1, least // block)
    warps = max(1, min(MAX_WARPS, rows * block // (32 * values_per_thread)))
    run = num_rows if keep is None else num_rows // keep.numel()
    return {"num_rows": num_rows, "run": run, "D": D, "BLOCK": block, "ROWS": rows, "num_warps": warps}


def _room_for_grads(x_new, scale, keep, weight):
    """Return uninitialised gradients of x, branch, scale, weight and bias; empty ones where nothing is written."""
    likes = (x_new, None if scale is None and keep is None else x_new, scale, weight, weight)
    return tuple(x_new.new_empty(0) if like is None else torch.empty_like(like) for like in likes)


def launch_layer_scale_residual_norm(
    x: Tensor, branch: Tensor, scale: Maybe, keep: Maybe, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the device code on what the public function checked; return as the reference does."""
    launch_counts["layer_scale_residual_norm"] += 1
    # Half as many of fp32: both inputs wait in registers, and some targets would spill.
    tiles = _tiles(x, keep, least=1024, values_per_thread=VALUES_PER_THREAD * 2 // x.itemsize)
    x_new, normed = torch.empty_like(x), torch.empty_like(x)
    mean = x.new_empty(tiles["num_rows"], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _layer_scale_residual_norm_kernel[(triton.cdiv(tiles["num_rows"], tiles["ROWS"]),)](
        x, branch, scale, keep, weight, bias, x_new, normed, mean, rstd, eps=eps, **tiles
    )
    return x_new, normed, mean, rstd


def launch_layer_scale_residual_norm_backward(
    grad_x_new: Maybe, grad_normed: Tensor, x_new: Tensor, branch: Maybe, scale: Maybe, keep: Maybe,
    weight: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the device code; `branch` is read for the gradient of `scale` alone.

    Returns:
        Gradients of x, branch, scale, weight and bias, each in its owner's type. Empty: that of an absent scale, and
        that of the branch where scale and keep are absent, which is that of x.
    """
    launch_counts["layer_scale_residual_norm_backward"] += 1
    # A value's three sums stay in registers: with 8 values a thread, 16 warps fit a multiprocessor.
    tiles = _tiles(x_new, keep, least=2048, values_per_thread=8)
    grad_x, grad_branch, grad_scale, grad_weight, grad_bias = _room_for_grads(x_new, scale, keep, weight)
    D, num_tiles = tiles["D"], triton.cdiv(tiles["num_rows"], tiles["ROWS"])
    programs = num_programs(x_new.device, num_tiles, each=MAX_WARPS // tiles["num_warps"])
    sums = mean.new_empty(programs, 2 if scale is None else 3, D)
    _layer_scale_residual_norm_backward_kernel[(programs,)](
        grad_x_new, grad_normed, x_new, branch, scale, keep, weight, mean, rstd,
        grad_x, grad_branch if grad_branch.numel() else None, sums,
        STAGES=3 if x_new.itemsize == 2 else 2, **tiles,
    )  # fmt: skip
    _sum_over_programs_kernel[(triton.cdiv(D, 32), sums.shape[1])](
        sums, grad_weight, grad_bias, grad_scale, num_rows=programs, D=D, BLOCK=32, ROWS=128, num_warps=8
    )
    return grad_x, grad_branch, grad_scale, grad_weight, grad_bias


# ---- custom ops: forward and backward. Their CPU code serves the checks that need no GPU.
_fwd = torch.library.custom_op("mnemos::layer_scale_residual_norm", mutates_args=(), device_types="cuda")(
    launch_layer_scale_residual_norm
)
_bwd = torch.library.custom_op(
    "mnemos::layer_scale_residual_norm_backward", mutates_args=(), device_types="cuda"
)(launch_layer_scale_residual_norm_backward)
_fwd.register_kernel("cpu")(layer_scale_residual_norm_reference)
_bwd.register_kernel("cpu")(backward_reference)


@_fwd.register_fake
def _(x, branch, scale, keep, weight, bias, eps):
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), torch.empty_like(x), mean, torch.empty_like(mean)


@_bwd.register_fake
def _(grad_x_new, grad_normed, x_new, branch, scale, keep, weight, mean, rstd):
    return _room_for_grads(x_new, scale, keep, weight)


def _setup_context(ctx, inputs, output) -> None:
    (_, branch, scale, keep, weight, _, _), (x_new, _, mean, rstd) = inputs, output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_new, None if scale is None else branch, scale, keep, weight, mean, rstd)


def _backward(ctx, grad_x_new, grad_normed, _grad_mean, _grad_rstd):
    x_new, branch, scale, keep, weight, mean, rstd = ctx.saved_tensors
    # No caller can see to it that these are contiguous: the gradient of a sum is one number repeated.
    grad_x_new = None if grad_x_new is None else grad_x_new.contiguous()
    grad_normed = torch.zeros_like(x_new) if grad_normed is None else grad_normed.contiguous()
    grad_x, grad_branch, grad_scale, *grads = _bwd(
        grad_x_new, grad_normed, x_new, branch, scale, keep, weight, mean, rstd
    )
    grad_branch = grad_x if scale is None and keep is None else grad_branch
    return grad_x, grad_branch, None if scale is None else grad_scale, None, *grads, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


# ---- public function: checks, then one call. The only name engine/ imports.
def layer_scale_residual_norm(
    x: Tensor, branch: Tensor, scale_D: Maybe, keep_B: Maybe, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return x + keep * scale * branch, and its LayerNorm.

    Args:
        x: the residual stream [..., D], contiguous; its rows are those of all leading axes together.
        branch: output of attention or MLP, same shape and type.
        scale_D: LayerScale; None is 1.
        keep_B: DropPath factor, fp32, 0 or 1 / (1 - p), of B runs of equally many rows each: one per sample of a batch,
            one per token of packed texts. Takes no gradient; None keeps every branch as it is.
        weight_D: LayerNorm gain.
        bias_D: LayerNorm offset, in the type of the gain.
        eps: added to the variance, above 0.

    Returns:
        The new residual stream and the normalised stream, both in the shape and type of x. The statistics are fp32
        whatever that type is, in backward too (fp64 for an fp64 x on a CPU).

    Raises:
        ValueError: shapes or types do not fit each other, or an input is not contiguous.
    """
    D, num_rows = x.shape[-1], x.shape[:-1].numel()
    if x.shape != branch.shape or x.dtype != branch.dtype or not x.is_floating_point():
        came = f"x {x.dtype} {tuple(x.shape)} and branch {branch.dtype} {tuple(branch.shape)}"
        raise ValueError(f"{came} must be of one shape and one floating type")
    if not (num_rows and 1 <= D <= MAX_WIDTH):
        raise ValueError(f"x {tuple(x.shape)} must hold at least one row of 1 to {MAX_WIDTH} values")
    parameters = [tensor for tensor in (scale_D, weight_D, bias_D) if tensor is not None]
    if any(tensor.shape != (D,) for tensor in parameters) or weight_D.dtype != bias_D.dtype:
        came = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in parameters)
        raise ValueError(f"scale, weight and bias must be [{D}], the last two of one type; got {came}")
    if keep_B is not None:
        B = keep_B.numel()
        if (
            keep_B.dtype != torch.float32
            or keep_B.shape != (B,)
            or not B
            or num_rows % B
            or keep_B.requires_grad
        ):
            came = f"keep {keep_B.dtype} {tuple(keep_B.shape)}"
            raise ValueError(
                f"{came} must be fp32 [B], B a divisor of the {num_rows} rows of x, and take no gradient"
            )
    if not all(tensor is None or tensor.is_contiguous() for tensor in (x, branch, keep_B, *parameters)):
        raise ValueError("every input must be contiguous; call .contiguous() where you made it")
    # On a CPU the op's own Python takes longer than the work of a small block.
    compute = layer_scale_residual_norm_reference if x.is_cpu else _fwd
    return compute(x, branch, scale_D, keep_B, weight_D, bias_D, eps)[:2]
