"""The gradient a loss leaves in forward, and what backward makes of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels._common.loss_gradient import BLOCK, launch_scale_gradient, scale_gradient
from mnemos.kernels.feature_mse import feature_mse
from mnemos.kernels.masked_lm_loss import masked_lm_loss
from mnemos.kernels.masked_patch_mse import masked_patch_mse


def patch_loss(x: Tensor, factor: Tensor | None = None) -> Tensor:
    images = torch.arange(2 * 64.0).view(2, 1, 8, 8).to(x.device).sin()
    ids = torch.tensor([[0, 2], [1, 3]], device=x.device)
    ones = torch.ones(2, device=x.device)
    return masked_patch_mse(
        x.view(2, 2, 16), images, ids, patch=(4, 4), channels=1, scale_B=ones, shift_B=ones, factor=factor
    )


def distance(x: Tensor, factor: Tensor | None = None) -> Tensor:
    return feature_mse(x, torch.linspace(-1, 1, 64, device=x.device).view(4, 16), factor)


def word_loss(x: Tensor, factor: Tensor | None = None) -> Tensor:
    weight = torch.linspace(-1, 1, 5 * 16, device=x.device).view(5, 16).sin()
    labels = torch.tensor([0, 4, -100, 2], device=x.device)
    return masked_lm_loss(x, weight, weight[:, 0].contiguous(), labels, factor)


LOSSES = pytest.mark.parametrize("loss", [patch_loss, distance, word_loss], ids=lambda loss: loss.__name__)


def features() -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("num", [1, 1000, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("upstream", [1.0, -1 / 3, 0.0, 1.0 + 2**-23])
def test_device_code_multiplies_in_place(
    num: int, upstream: float, dtype: torch.dtype, device: torch.device
) -> None:
    around = torch.randn(num + 2, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    before, grad = around.clone(), around[1:-1]
    count = launch_counts["scale_gradient"]
    launch_scale_gradient(grad, torch.tensor(upstream, device=device))
    assert launch_counts["scale_gradient"] == count + 1
    expected = before[1:-1].double() * upstream
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert around[0] == before[0] and around[-1] == before[-1]


def test_registered_as_a_custom_op() -> None:
    torch.library.opcheck(torch.ops.mnemos.scale_gradient, (torch.randn(10), torch.tensor(2.0)))


def test_a_gradient_for_an_upstream_of_one_is_not_touched() -> None:
    grad = torch.tensor([torch.nan, 1.0])  # of a bf16 NaN the payload would change
    version = grad.clone()
    scale_gradient(grad, torch.tensor(1.0))
    assert grad.view(torch.int32).equal(version.view(torch.int32))


@LOSSES
def test_factor_and_upstream_both_scale_the_gradient(loss: Callable[..., Tensor]) -> None:
    x = features()
    (plain,) = torch.autograd.grad(loss(x), x)
    factor = torch.tensor(0.3)
    torch.testing.assert_close(loss(x, factor), loss(x) * factor)
    (weighted,) = torch.autograd.grad(loss(x, factor), x)
    torch.testing.assert_close(weighted, plain * factor)
    (both,) = torch.autograd.grad(-2.0 * loss(x, factor), x)
    torch.testing.assert_close(both, plain * factor * -2.0)


@LOSSES
def test_a_second_backward_is_refused(loss: Callable[..., Tensor]) -> None:
    x = features()
    value = loss(x) * 2.0
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@LOSSES
def test_no_gradient_is_formed_where_none_is_wanted(loss: Callable[..., Tensor]) -> None:
    x = features()
    value = loss(x)
    with torch.no_grad():
        alone = loss(x)
    assert alone.equal(value) and not alone.requires_grad and not loss(x.detach()).requires_grad


@LOSSES
@pytest.mark.parametrize("upstream", [1.0, -2.0])
def test_compiles_as_a_whole(loss: Callable[..., Tensor], upstream: float, device: torch.device) -> None:
    backend = "inductor" if device.type == "cuda" else "aot_eager"

    def step(x: Tensor) -> Tensor:
        return loss(x * 2.0) * upstream

    x = features().detach().to(device).requires_grad_()
    value = torch.compile(step, fullgraph=True, backend=backend)(x)
    (grad,) = torch.autograd.grad(value, x)
    (expected,) = torch.autograd.grad(step(x), x)
    torch.testing.assert_close(value, step(x))
    torch.testing.assert_close(grad, expected)
