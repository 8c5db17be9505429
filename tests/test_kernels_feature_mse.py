"""feature_mse: reference and device code, loss and gradient, against the definition."""

import pytest
import torch
from compare import assert_as_accurate_as_eager
from loss_op import check_loss_op
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.feature_mse import BLOCK, feature_mse, feature_mse_reference, launch_feature_mse

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FACTOR, UPSTREAM = 5.0 / 32.0, -27.0 / 64.0  # exact in fp32
SHAPES = [
    pytest.param((1, 1), id="smallest"),
    pytest.param((3, 5, 7), id="B3-N5-D7"),
    pytest.param((2, 50, 768), id="base-image"),
    pytest.param((1, 37, 768), id="base-volume"),
    pytest.param((1, 33, 1408), id="giant-packed"),
    pytest.param((4, BLOCK), id="whole-blocks"),
    pytest.param((1, BLOCK + 1), id="one-past-a-block"),
]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return student, teacher + 1.0


def by_definition(student: Tensor, teacher: Tensor, at: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return loss and gradient row by row, computed in `at`, the gradient in the student's type."""
    leaf = student.clone().requires_grad_()
    rows = zip(leaf.flatten(0, -2), teacher.flatten(0, -2), strict=True)
    loss = torch.stack([(own.to(at) - other.to(at)).square().mean() for own, other in rows]).sum() * FACTOR
    (grad,) = torch.autograd.grad(loss * UPSTREAM, leaf)
    return loss.detach(), grad


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_device_code_and_public_function_match_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    student, teacher = make(shape, dtype)
    oracle = by_definition(student.double(), teacher.double(), torch.float64)
    eager = by_definition(student, teacher, torch.float32)
    factor = torch.tensor(FACTOR)

    before = launch_counts["feature_mse"]
    on_device = [tensor.to(device) for tensor in (student, teacher, factor)]
    loss, grad = launch_feature_mse(*on_device, True)
    assert launch_counts["feature_mse"] == before + 1
    assert_as_accurate_as_eager("device code, loss", loss.cpu(), eager[0], oracle[0])
    assert_as_accurate_as_eager("device code, gradient", grad.cpu() * UPSTREAM, eager[1], oracle[1])
    alone, nothing = launch_feature_mse(*on_device, False)
    assert alone.equal(loss) and nothing.numel() == 0

    leaf = student.clone().requires_grad_()
    loss = feature_mse(leaf, teacher, factor)
    (grad,) = torch.autograd.grad(loss * UPSTREAM, leaf)
    assert_as_accurate_as_eager("public function, loss", loss.detach(), eager[0], oracle[0])
    assert_as_accurate_as_eager("public function, gradient", grad, eager[1], oracle[1])
    assert_as_accurate_as_eager(
        "reference", feature_mse_reference(student, teacher, factor), eager[0], oracle[0]
    )


def test_values_past_the_last_row_do_not_leak(device: torch.device) -> None:
    whole = torch.full((3, 8), torch.nan, device=device)
    whole[1] = 2.0
    loss, grad = launch_feature_mse(whole[1:2], torch.zeros(1, 8, device=device), None, True)
    assert loss == 4.0 and grad.eq(0.5).all()


def test_no_rows_are_a_loss_of_zero() -> None:
    student = torch.zeros(1, 0, 8, requires_grad=True)
    assert feature_mse(student, torch.zeros(1, 0, 8)) == 0.0


@DTYPES
def test_registered_as_a_custom_op(dtype: torch.dtype) -> None:
    student, teacher = make((2, 3, 4), dtype)
    for factor in (None, torch.tensor(FACTOR)):
        check_loss_op(torch.ops.mnemos.feature_mse, (student.requires_grad_(), teacher, factor, True))
        check_loss_op(torch.ops.mnemos.feature_mse, (student.detach(), teacher, factor, False))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        feature_mse(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="teacher takes no gradient"):
        feature_mse(torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match="contiguous"):
        feature_mse(torch.zeros(3, 2).t(), torch.zeros(2, 3))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [(128, 50, 768), (128, 37, 1024), (1, 9_601, 1408)])
def test_cuda_path_on_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher = (tensor.cuda() for tensor in make(shape, dtype))
    factor = torch.tensor(FACTOR, device="cuda")

    def by_reference(at: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = student.to(at, copy=True).requires_grad_()
        loss = feature_mse_reference(leaf, teacher, factor)
        (grad,) = torch.autograd.grad(loss * UPSTREAM, leaf)
        return loss.detach(), grad

    leaf = student.clone().requires_grad_()
    before = launch_counts["feature_mse"]
    loss = feature_mse(leaf, teacher, factor)
    assert launch_counts["feature_mse"] == before + 1
    (grad,) = torch.autograd.grad(loss * UPSTREAM, leaf)
    for name, *results in zip(
        ("loss", "grad"), (loss.detach(), grad), by_reference(dtype), by_reference(torch.float64), strict=True
    ):
        assert_as_accurate_as_eager(name, *results)
