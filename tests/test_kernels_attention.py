"""attention against a loop in fp64, forward and backward."""

import pytest
import torch
from compare import assert_as_accurate_as_eager

from mnemos.kernels.attention import attention

SHAPES = [
    pytest.param(2, 3, 17, 64, id="visible-tokens-of-the-sample-preset"),
    pytest.param(1, 4, 65, 32, id="decoder-of-the-sample-preset"),
    pytest.param(1, 1, 1, 8, id="one-token"),
    pytest.param(2, 2, 7, 88, id="head-width-88"),
]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Loop over samples, heads and queries; masked keys are left out instead of given a weight."""
    samples = []
    for sample in range(q.shape[0]):
        keys = torch.arange(q.shape[2]) if mask is None else mask[sample].nonzero()[:, 0]
        heads = []
        for head in range(q.shape[1]):
            rows = []
            for query in q[sample, head]:
                weight = torch.exp(k[sample, head, keys] @ query / q.shape[3] ** 0.5)
                rows.append((weight / weight.sum()) @ v[sample, head, keys])
            heads.append(torch.stack(rows))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


@pytest.mark.parametrize("masked", [False, True], ids=["all-visible", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "H", "L", "W"), SHAPES)
def test_matches_a_loop(B: int, H: int, L: int, W: int, dtype: torch.dtype, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(B, H, L, W, generator=generator).to(dtype) for _ in range(3)]
    upstream = torch.randn(B, H, L, W, generator=generator)
    mask = None
    if masked:
        mask = torch.rand(B, L, generator=generator) < 0.6
        mask[:, 0] = True

    def run(function, at: torch.dtype):
        leaves = [tensor.detach().to(at, copy=True).requires_grad_() for tensor in inputs]
        out = function(*leaves, mask)
        (out * upstream.to(at)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def eager(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None, None, :]
        )

    for name, ours, theirs, exact in zip(
        ("out", "dq", "dk", "dv"),
        run(attention, dtype),
        run(eager, dtype),
        run(oracle, torch.float64),
        strict=True,
    ):
        assert_as_accurate_as_eager(name, ours, theirs, exact)


def test_masked_tokens_do_not_leak_even_where_they_are_huge() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    mask = torch.tensor([[True, True, True, False, False]])
    wild_k, wild_v = k.clone(), v.clone()
    wild_k[:, :, 3:], wild_v[:, :, 3:] = 1e4, 1e4
    assert torch.equal(attention(q, k, v, mask)[:, :, :3], attention(q, wild_k, wild_v, mask)[:, :, :3])


def test_a_row_without_visible_tokens_is_finite() -> None:
    q = torch.randn(1, 1, 3, 8)
    assert torch.isfinite(attention(q, q, q, torch.zeros(1, 3, dtype=torch.bool))).all()


def test_shapes_that_disagree_are_named() -> None:
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 8\), \(1, 1, 2, 8\)"):
        attention(q, q[:, :, :2], q)


def test_causal_tokens_see_themselves_and_what_stands_before() -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 8).unbind(0)
    mask = torch.tensor([[True, True, True, True, True, True], [True, False, True, True, False, True]])
    out = attention(q, k, v, mask, causal=True)
    for length in range(1, 7):  # the last row of a shorter sequence is that row of the longer one
        short = attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], mask[:, :length])
        torch.testing.assert_close(out[:, :, length - 1], short[:, :, -1])
