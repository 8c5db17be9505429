"""masked_lm_loss against log-sum-exp written out, in one chunk and in many."""

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from mnemos.kernels import masked_lm_loss as module
from mnemos.kernels.masked_lm_loss import masked_lm_loss

NAMES = ("loss", "grad hidden", "grad weight", "grad bias")
UPSTREAM = 0.37


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
