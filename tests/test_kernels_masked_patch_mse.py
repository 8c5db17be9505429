"""masked_patch_mse: reference and device code, loss and gradient, against targets made one patch at a time."""

from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager
from loss_op import check_loss_op
from patch_oracle import CASES, REAL_CASES, PatchCase, slice_patches
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.masked_patch_mse import (
    launch_masked_patch_mse,
    masked_patch_mse,
    masked_patch_mse_reference,
)

FACTOR, UPSTREAM = 29.0 / 64.0, 27.0 / 64.0  # exact in fp32


def predictions(case: PatchCase, dtype: torch.dtype) -> Tensor:
    ids = case.inputs()["ids"]
    num_values = case.channels * torch.Size(case.patch).numel()
    return torch.randn(*ids.shape, num_values, generator=torch.Generator().manual_seed(5)).to(dtype)


def by_slices(case: PatchCase, pred: Tensor, flip: bool, at: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and its gradient from the definition, computed in `at`."""
    made = case.inputs()
    values = slice_patches(case, made["images"], made["ids"], made["flip"] if flip else None).to(at)
    values = values * made["scale"].to(at)[:, None, None] + made["shift"].to(at)[:, None, None]
    leaf = pred.detach().clone().requires_grad_()
    loss = torch.zeros((), dtype=at)
    for b in range(values.shape[0]):
        for m in range(values.shape[1]):
            patch = values[b, m]
            target = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
            loss = loss + (leaf[b, m].to(at) - target).square().mean() * FACTOR
    (loss * UPSTREAM).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("case", CASES)
def test_device_code_and_public_function_match_slices(
    case: PatchCase, flip: bool, dtype: torch.dtype, device: torch.device
) -> None:
    pred = predictions(case, dtype)
    loss_oracle, grad_oracle = by_slices(case, pred.double(), flip, torch.float64)
    loss_eager, grad_eager = by_slices(case, pred, flip, torch.float32)

    made = case.inputs(device)
    args = (
        *(pred.to(device), made["images"], made["ids"], case.patch, case.channels, made["scale"]),
        made["flip"] if flip else None,
    )
    before = launch_counts["masked_patch_mse"]
    loss, grad = launch_masked_patch_mse(*args, torch.tensor(FACTOR, device=device), True)
    assert launch_counts["masked_patch_mse"] == before + 1
    assert_as_accurate_as_eager("device code, loss", loss.cpu(), loss_eager, loss_oracle)
    assert_as_accurate_as_eager("device code, gradient", UPSTREAM * grad.cpu(), grad_eager, grad_oracle)
    alone, nothing = launch_masked_patch_mse(*args, torch.tensor(FACTOR, device=device), False)
    assert alone.equal(loss) and nothing.numel() == 0

    host = case.inputs()
    leaf = pred.clone().requires_grad_()
    loss = masked_patch_mse(
        leaf,
        host["images"],
        host["ids"],
        patch=case.patch,
        channels=case.channels,
        scale_B=host["scale"],
        shift_B=host["shift"],
        flip_BA=host["flip"] if flip else None,
        factor=torch.tensor(FACTOR),
    )
    (loss * UPSTREAM).backward()
    assert leaf.grad is not None
    assert_as_accurate_as_eager("public function, loss", loss.detach(), loss_eager, loss_oracle)
    assert_as_accurate_as_eager("public function, gradient", leaf.grad, grad_eager, grad_oracle)


@pytest.mark.parametrize("value", [-32768, 0, 32767])
def test_constant_patch_has_target_zero(value: int, device: torch.device) -> None:
    images = torch.full((1, 1, 4, 4, 4), value, dtype=torch.int16)
    pred, ids = torch.randn(1, 1, 64), torch.zeros(1, 1, dtype=torch.int64)
    scale, shift = torch.full((1,), 1 / 1024), torch.zeros(1)
    expected = pred.double().square().mean()
    tensors = (tensor.to(device) for tensor in (pred, images, ids))
    loss, _ = launch_masked_patch_mse(*tensors, (4, 4, 4), 1, scale.to(device), None, None, False)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0)
    loss = masked_patch_mse(pred, images, ids, patch=(4, 4, 4), channels=1, scale_B=scale, shift_B=shift)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_a_step_of_one_unit_far_from_zero_keeps_its_digits(device: torch.device) -> None:
    """The mean lies between two fp32 numbers, 0.002 apart, unless the patch is counted from its first value."""
    images = torch.full((1, 1, 15, 16, 16), 32767, dtype=torch.int16)
    images[..., 5:] = 32766
    images[..., 0, :, :] = 32766
    patch, scale = (15, 16, 16), torch.full((1,), 1 / 1024)
    target = images.double().flatten() / 1024
    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    pred, ids = torch.zeros(1, 1, 3840, requires_grad=True), torch.zeros(1, 1, dtype=torch.int64)
    upstream = torch.tensor(1920.0)  # makes the gradient prediction - target

    tensors = [tensor.to(device) for tensor in (pred.detach(), images, ids, scale, upstream)]
    _, grad = launch_masked_patch_mse(*tensors[:3], patch, 1, tensors[3], None, tensors[4], True)
    torch.testing.assert_close(grad.cpu().double().flatten(), -target, rtol=1e-5, atol=0)
    loss = masked_patch_mse(pred, images, ids, patch=patch, channels=1, scale_B=scale, shift_B=scale)
    (grad,) = torch.autograd.grad(loss, pred, upstream)
    torch.testing.assert_close(grad.double().flatten(), -target, rtol=1e-5, atol=0)


def test_patches_not_asked_for_do_not_leak(device: torch.device) -> None:
    images = torch.full((1, 1, 4, 8), torch.nan)
    images[..., 4:] = torch.arange(16.0).view(4, 4)
    args = (torch.zeros(1, 1, 16), images, torch.tensor([[1]]))
    ones = torch.ones(1)
    on_device = (tensor.to(device) for tensor in args)
    loss, _ = launch_masked_patch_mse(*on_device, (4, 4), 1, ones.to(device), None, None, False)
    torch.testing.assert_close(loss.cpu(), torch.tensor(15 / 16))
    loss = masked_patch_mse(*args, patch=(4, 4), channels=1, scale_B=ones, shift_B=ones)
    torch.testing.assert_close(loss, torch.tensor(15 / 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_registered_as_a_custom_op(dtype: torch.dtype) -> None:
    case = PatchCase(image=(2, 1, 4, 8), patch=(4, 4), channels=3, num_ids=1)
    made = case.inputs()
    pred = predictions(case, dtype).requires_grad_()
    args = (pred, made["images"], made["ids"], case.patch, 3, made["scale"], made["flip"], None, True)
    check_loss_op(torch.ops.mnemos.masked_patch_mse, args)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "too-few-values": ({"pred_BMP": torch.zeros(2, 1, 15)}, r"\(2, 1, 15\).*\(2, 1, 16\)"),
    "another-number-of-patches": ({"pred_BMP": torch.zeros(2, 2, 16)}, r"\(2, 2, 16\).*\(2, 1, 16\)"),
    "one-value-a-patch": ({"pred_BMP": torch.zeros(2, 1, 1), "patch": (1, 1)}, "at least 2"),
    "not-contiguous": ({"pred_BMP": torch.zeros(2, 1, 32)[..., ::2]}, "contiguous"),
    "shift-of-another-batch": ({"shift_B": torch.zeros(3)}, r"\[2\]"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "pred_BMP": torch.zeros(2, 1, 16),
        "images": torch.zeros(2, 1, 4, 8),
        "ids_BM": torch.zeros(2, 1, dtype=torch.int64),
        "patch": (4, 4),
        "channels": 1,
        "scale_B": torch.ones(2),
        "shift_B": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        masked_patch_mse(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("case", REAL_CASES)
def test_cuda_path_on_real_shapes(case: PatchCase, flip: bool, dtype: torch.dtype) -> None:
    made, pred = case.inputs("cuda"), predictions(case, dtype).cuda()
    mirror = made["flip"] if flip else None
    shared = (made["images"], made["ids"], case.patch, case.channels, made["scale"], mirror)

    factor = torch.tensor(FACTOR, device="cuda")

    def by_reference(at: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = pred.to(at, copy=True).requires_grad_()
        loss = masked_patch_mse_reference(leaf, *shared, factor=factor)
        (grad,) = torch.autograd.grad(loss * UPSTREAM, leaf)
        return loss.detach(), grad

    leaf = pred.clone().requires_grad_()
    before = launch_counts["masked_patch_mse"]
    loss = masked_patch_mse(
        leaf,
        *shared[:2],
        patch=case.patch,
        channels=case.channels,
        scale_B=made["scale"],
        shift_B=made["shift"],
        flip_BA=mirror,
        factor=factor,
    )
    assert launch_counts["masked_patch_mse"] == before + 1
    (grad,) = torch.autograd.grad(loss * UPSTREAM, leaf)
    for name, *results in zip(
        ("loss", "grad"), (loss.detach(), grad), by_reference(dtype), by_reference(torch.float64), strict=True
    ):
        assert_as_accurate_as_eager(name, *results)
    check_loss_op(torch.ops.mnemos.masked_patch_mse, (leaf, *shared, factor, True))
