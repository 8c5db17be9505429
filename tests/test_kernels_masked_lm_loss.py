"""masked_lm_loss against log-sum-exp written out, in one chunk and in many; reference and device code."""

from functools import partial

import pytest
import torch
from compare import assert_as_accurate_as_eager
from loss_op import check_loss_op
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from mnemos.kernels import masked_lm_loss as module
from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.masked_lm_loss import (
    BLOCK,
    launch_softmax_gradient,
    masked_lm_loss,
    masked_lm_loss_reference,
)

NAMES = ("loss", "grad hidden", "grad weight", "grad bias")
UPSTREAM = 23.0 / 64.0


def make(N: int, D: int, V: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=g).to(dtype) for shape in [(N, D), (V, D), (V,)]]
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::3] = -100
    return made, labels


def with_grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * UPSTREAM, leaves)]


def by_rows(made: list[Tensor], labels: Tensor) -> list[Tensor]:
    """Return loss and gradients from the definition, in fp64."""
    leaves = [tensor.double().requires_grad_() for tensor in made]
    hidden, weight, bias = leaves
    loss = 0.0 * sum(leaf.sum() for leaf in leaves)
    for n, label in enumerate(labels.tolist()):
        if label != -100:
            logits = weight @ hidden[n] + bias
            loss = loss + logits.exp().sum().log() - logits[label]
    return with_grads(loss, leaves)


def by_eager(made: list[Tensor], labels: Tensor) -> list[Tensor]:
    """Return what a model written without the op computes: logits in the inputs' type, the rest in fp32."""
    leaves = [tensor.clone().requires_grad_() for tensor in made]
    return with_grads(cross_entropy(linear(*leaves).float(), labels, reduction="sum"), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1 << 24, 500], ids=["one-chunk", "many-chunks"])
@pytest.mark.parametrize(
    ("N", "D", "V"),
    [
        pytest.param(7, 5, 11, id="N7-D5-V11"),
        pytest.param(1, 3, 2, id="no-row-scored"),
        pytest.param(2, 1, 1, id="smallest"),
        pytest.param(40, 24, 50, id="N40-D24-V50"),
    ],
)
def test_matches_the_definition(
    N: int, D: int, V: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    made, labels = make(N, D, V, dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in made]
    ours = with_grads(masked_lm_loss(*leaves, labels), leaves)
    for name, *results in zip(NAMES, ours, by_eager(made, labels), by_rows(made, labels), strict=True):
        assert_as_accurate_as_eager(name, *results)
    assert_as_accurate_as_eager(
        "reference",
        masked_lm_loss_reference(*made, labels),
        by_eager(made, labels)[0],
        by_rows(made, labels)[0],
    )


# ---- device code
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FACTOR = 19.0 / 64.0  # exact in fp32


@DTYPES
@pytest.mark.parametrize(
    ("N", "D", "V", "rows"),
    [
        pytest.param(7, 5, 11, 3, id="N7-D5-V11-three-chunks"),
        pytest.param(7, 5, 11, 7, id="N7-D5-V11-one-chunk"),
        pytest.param(2, 1, 1, 1, id="smallest"),
        pytest.param(16, 32, BLOCK, 6, id="V-one-block"),
        pytest.param(16, 32, BLOCK + 1, 90, id="V-one-past-a-block"),
        pytest.param(4, 16, 49_411, 4, id="V-official"),
    ],
)
def test_device_code_between_the_products(
    N: int, D: int, V: int, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    made, labels = make(N, D, V, dtype)
    on_device = [tensor.to(device) for tensor in (*made, labels, torch.tensor(FACTOR))]
    before = launch_counts["softmax_gradient"]
    run = partial(module._by_chunks, launch_softmax_gradient, rows, *on_device)
    loss, *grads = run([True, True, True])
    assert launch_counts["softmax_gradient"] == before + -(-N // rows)
    ours = [loss.cpu() / FACTOR, *(grad.cpu() * (UPSTREAM / FACTOR) for grad in grads)]
    for name, *results in zip(NAMES, ours, by_eager(made, labels), by_rows(made, labels), strict=True):
        assert_as_accurate_as_eager(name, *results)
    alone, *nothing = run([False, False, False])
    assert alone.equal(loss) and not any(grad.numel() for grad in nothing)


def test_device_code_takes_rows_wider_than_the_vocabulary(device: torch.device) -> None:
    logits = torch.full((3, 8), torch.nan, device=device)
    logits[:, :5] = torch.linspace(-2, 2, 15, device=device).view(3, 5)
    expected = logits[:, :5].clone().requires_grad_()
    labels = torch.tensor([4, -100, 0], device=device)
    loss = cross_entropy(expected, labels, reduction="sum")
    loss.backward()
    ours, grad = launch_softmax_gradient(logits[:, :5], labels, None, True)
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(grad, expected.grad)
    assert logits[:, 5:].isnan().all()


def test_device_code_ignores_a_row_that_is_not_scored_whatever_it_holds(device: torch.device) -> None:
    logits = torch.full((2, 4), torch.nan, device=device)
    logits[1] = 0.0
    labels = torch.tensor([-100, 3], device=device)
    loss, grad = launch_softmax_gradient(logits, labels, None, True)
    torch.testing.assert_close(loss.cpu(), torch.tensor(4.0).log())
    assert grad[0].eq(0).all() and grad[1].cpu().equal(torch.tensor([0.25, 0.25, 0.25, -0.75]))


def test_device_code_keeps_large_logits_finite(device: torch.device) -> None:
    logits = torch.tensor([[1000.0, -1000.0], [-1e30, 0.0]], device=device)
    loss, grad = launch_softmax_gradient(logits, torch.tensor([1, 1], device=device), None, True)
    assert loss == 2000.0 and grad.cpu().equal(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


@DTYPES
def test_registered_as_a_custom_op(dtype: torch.dtype) -> None:
    made, labels = make(6, 4, 9, dtype)
    for wanted in ([True, True, True], [True, False, False]):
        inputs = [tensor.clone().requires_grad_(want) for tensor, want in zip(made, wanted, strict=True)]
        check_loss_op(torch.ops.mnemos.masked_lm_loss, (*inputs, labels, torch.tensor(FACTOR), wanted))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("N", "D", "V"), [(2_000, 768, 49_411), (1_001, 192, 1_500)])
def test_cuda_path_on_real_shapes(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    made, labels = make(N, D, V, dtype)
    made = [tensor.cuda() / 16 for tensor in made]
    labels, factor = labels.cuda(), torch.tensor(FACTOR, device="cuda")

    def run(fn: object, at: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(at, copy=True).requires_grad_() for tensor in made]
        return with_grads(fn(*leaves, labels, factor), leaves)  # type: ignore[operator]

    before = launch_counts["softmax_gradient"]
    ours = run(masked_lm_loss, dtype)
    assert launch_counts["softmax_gradient"] > before
    eager, oracle = run(masked_lm_loss_reference, dtype), run(masked_lm_loss_reference, torch.float64)
    for name, *results in zip(NAMES, ours, eager, oracle, strict=True):
        assert_as_accurate_as_eager(name, *results)


# ---- what holds on every device
def test_no_scored_row_is_a_loss_of_zero_with_zero_gradients() -> None:
    made, labels = make(6, 4, 9, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in made]
    loss, *grads = with_grads(masked_lm_loss(*leaves, torch.full_like(labels, -100)), leaves)
    assert loss == 0.0 and all(grad.eq(0).all() for grad in grads)


def test_only_the_gradients_asked_for_are_made() -> None:
    (hidden, weight, bias), labels = make(6, 4, 9, torch.float32)
    bias.requires_grad_()
    masked_lm_loss(hidden, weight, bias, labels).backward()
    assert bias.grad is not None and hidden.grad is None and weight.grad is None
    assert not masked_lm_loss(hidden, weight, bias.detach(), labels).requires_grad


def test_large_logits_stay_finite() -> None:
    hidden, weight = torch.full((2, 1), 100.0), torch.tensor([[10.0], [-10.0]])
    loss = masked_lm_loss(hidden, weight, torch.zeros(2), torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor(2000.0))


def test_shapes_and_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(9, 5\)"):
        masked_lm_loss(
            torch.zeros(6, 4), torch.zeros(9, 5), torch.zeros(9), torch.zeros(6, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        made, labels = make(2, 3, 4, torch.float32)
        masked_lm_loss(made[0].bfloat16(), *made[1:], labels)
    with pytest.raises(ValueError, match="contiguous"):
        masked_lm_loss(made[0].t().contiguous().t(), *made[1:], labels)
