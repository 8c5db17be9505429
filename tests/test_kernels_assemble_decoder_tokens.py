"""assemble_decoder_tokens: reference and device code, forward and backward, against a loop over places."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.assemble_decoder_tokens import (
    assemble_decoder_tokens,
    assemble_decoder_tokens_backward_reference,
    assemble_decoder_tokens_reference,
    launch_assemble_decoder_tokens,
    launch_assemble_decoder_tokens_backward,
)

FP32, BF16 = torch.float32, torch.bfloat16
# the tokens' type, then that of mask token and positions: what an optimizer may keep in fp32 beside bf16 tokens
TYPES = pytest.mark.parametrize(
    ("dtype", "others"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=["fp32", "mixed", "bf16"]
)
SHAPES = [
    pytest.param((1, 1, 1, 0, 1), id="smallest"),
    pytest.param((2, 5, 3, 0, 7), id="no-prefix"),
    pytest.param((3, 9, 9, 1, 4), id="all-visible"),
    pytest.param((5, 19, 1, 2, 40), id="two-in-front-one-visible"),
    pytest.param((2, 7, 2, 9, 12), id="more-in-front-than-a-tile"),
    pytest.param((3, 64, 16, 1, 128), id="sample"),
    pytest.param((2, 196, 49, 1, 512), id="image"),
    pytest.param((3, 144, 36, 1, 512), id="volume"),
    pytest.param((1, 300, 270, 1, 320), id="more-visible-than-compared-at-once"),
]
NAMES = ("out", "grad of tokens", "grad of mask token", "grad of positions")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch and the gradient that comes back for it."""

    tokens: Tensor
    mask_token: Tensor
    positions: Tensor
    visible: Tensor
    num_prefix: int
    grad: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, others: torch.dtype) -> "Inputs":
        B, patches, K, prefix, D = shape
        g = torch.Generator().manual_seed(patches + D)
        visible = torch.stack([torch.randperm(patches, generator=g)[:K] for _ in range(B)])  # in no order
        return cls(
            tokens=torch.randn(B, prefix + K, D, generator=g).to(dtype),
            mask_token=(torch.randn(D, generator=g) + 1.0).to(others),
            positions=torch.randn(prefix + patches, D, generator=g).to(others),
            visible=visible,
            num_prefix=prefix,
            grad=(torch.randn(B, prefix + patches, D, generator=g) + 0.5).to(dtype),
        )

    def leaves(self, at: torch.dtype | None = None) -> list[Tensor]:
        made = (self.tokens, self.mask_token, self.positions)
        return [tensor.to(at or tensor.dtype, copy=True).requires_grad_() for tensor in made]


def by_loop(made: Inputs, at: torch.dtype) -> list[Tensor]:
    """Return the output and three gradients, added up place by place in `at`; nothing is rounded before the end."""
    tokens, mask, positions = (tensor.detach().to(at) for tensor in made.leaves())
    grad, prefix = made.grad.to(at), made.num_prefix
    out, grad_tokens = torch.empty_like(grad), torch.full_like(tokens, torch.nan)
    grad_mask, grad_positions = torch.zeros_like(mask), torch.zeros_like(positions)
    for b, visible in enumerate(made.visible.tolist()):
        token_at = {prefix + patch: prefix + k for k, patch in enumerate(visible)} | {
            i: i for i in range(prefix)
        }
        for place in range(len(positions)):
            token = token_at.get(place)
            out[b, place] = (mask if token is None else tokens[b, token]) + positions[place]
            grad_positions[place] += grad[b, place]
            if token is None:
                grad_mask += grad[b, place]
            else:
                grad_tokens[b, token] = grad[b, place]
    return [out, grad_tokens, grad_mask, grad_positions]


def cast(results: list[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    return [result.to(dtype) for result, dtype in zip(results, dtypes, strict=True)]


@TYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_device_code_and_public_function_match_a_loop(
    shape: tuple[int, ...], dtype: torch.dtype, others: torch.dtype, device: torch.device
) -> None:
    made = Inputs.make(shape, dtype, others)
    oracle, eager = by_loop(made, torch.float64), by_loop(made, FP32)

    before = launch_counts.copy()
    visible, grad = made.visible.to(device), made.grad.to(device)
    on_device = [tensor.detach().to(device) for tensor in made.leaves()]
    out = launch_assemble_decoder_tokens(*on_device, visible, made.num_prefix)
    grads = launch_assemble_decoder_tokens_backward(grad, visible, made.num_prefix, True)
    for name in ("assemble_decoder_tokens", "assemble_decoder_tokens_backward"):
        assert launch_counts[name] == before[name] + 1
    compare("device code", [out, *grads], cast(eager, dtype, dtype, FP32, FP32), oracle)

    leaves = made.leaves()
    out = assemble_decoder_tokens(*leaves, made.visible, num_prefix=made.num_prefix)
    grads = torch.autograd.grad(out, leaves, made.grad)
    compare("public function", [out.detach(), *grads], cast(eager, dtype, dtype, others, others), oracle)


def compare(what: str, ours: list[Tensor], eager: list[Tensor], oracle: list[Tensor]) -> None:
    for name, *results in zip(NAMES, ours, eager, oracle, strict=True):
        assert_as_accurate_as_eager(f"{what}, {name}", *(result.cpu() for result in results))
    assert ours[1].double().cpu().equal(oracle[1]), f"{what}: gradients of tokens are copies"


def test_sums_are_rounded_once() -> None:
    """1 + 2**-8 + 2**-8 is 1 + 2**-7 in bf16; an fp32 mask token rounded first would leave 1 + 2**-8, rounded to 1."""
    args = (torch.ones(1, 1, 8, dtype=BF16), torch.full((8,), 1 + 2**-8), torch.full((3, 8), 2**-8))
    visible = torch.zeros(1, 1, dtype=torch.int64)
    out = assemble_decoder_tokens(args[0], args[1], args[2][:2], visible, num_prefix=0)
    assert out.dtype == BF16 and out[0, 1].eq(1 + 2**-7).all()
    out = launch_assemble_decoder_tokens(args[0], args[1], args[2][:2], visible, 0)
    assert out.dtype == BF16 and out[0, 1].eq(1 + 2**-7).all()


def test_positions_get_a_gradient_only_where_asked() -> None:
    made = Inputs.make((2, 9, 3, 1, 8), FP32, FP32)
    launched = launch_assemble_decoder_tokens_backward(made.grad, made.visible, 1, False)
    assert launched[2].numel() == 0
    tokens, mask_token, positions = made.leaves()
    out = assemble_decoder_tokens(tokens, mask_token, positions.detach(), made.visible)
    for ours, expected in zip(
        torch.autograd.grad(out, (tokens, mask_token), made.grad), by_loop(made, FP32)[1:3], strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_gradients_of_seen_places_do_not_leak_into_the_mask_token(device: torch.device) -> None:
    grad, visible = torch.full((1, 20, 5), torch.nan), torch.tensor([[11, 2]])
    masked = [place for place in range(1, 20) if place not in (12, 3)]
    grad[:, masked] = 1.0
    for ours in (
        launch_assemble_decoder_tokens_backward(grad.to(device), visible.to(device), 1, False),
        assemble_decoder_tokens_backward_reference(grad, visible, 1, False),
    ):
        assert ours[0].isnan().all() and ours[1].eq(len(masked)).all()


def test_gradient_without_rows_is_taken() -> None:
    made = Inputs.make((2, 9, 3, 1, 8), FP32, FP32)
    leaves = made.leaves()
    grads = torch.autograd.grad(assemble_decoder_tokens(*leaves, made.visible).sum(), leaves)
    assert grads[0].eq(1).all() and grads[1].eq(2 * 6).all() and grads[2].eq(2).all()


def test_reference_can_be_differentiated() -> None:
    made = Inputs.make((2, 6, 3, 1, 4), torch.float64, torch.float64)
    for op in (assemble_decoder_tokens_reference, torch.ops.mnemos.assemble_decoder_tokens):
        assert torch.autograd.gradcheck(lambda *leaves, op=op: op(*leaves, made.visible, 1), made.leaves())


@TYPES
def test_registered_as_a_custom_op(dtype: torch.dtype, others: torch.dtype) -> None:
    made = Inputs.make((2, 9, 3, 1, 8), dtype, others)
    tokens, mask_token, positions = made.leaves()
    for table in (positions, positions.detach()):
        args = (tokens, mask_token, table, made.visible, 1)
        torch.library.opcheck(torch.ops.mnemos.assemble_decoder_tokens, args)


def test_compiles_as_one_graph() -> None:
    made = Inputs.make((2, 9, 3, 1, 8), FP32, FP32)

    def assemble(tokens: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
        return assemble_decoder_tokens(tokens * 2, mask_token, positions, made.visible)

    results = []
    for run in (torch.compile(assemble, fullgraph=True, backend="aot_eager"), assemble):
        leaves = made.leaves()
        out = run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, made.grad)])
    assert all(ours.equal(eager) for ours, eager in zip(*results, strict=True))


ONE_ID = torch.zeros(1, 1, dtype=torch.int64)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "too-many-tokens": ({"tokens_BND": torch.ones(1, 3, 4)}, r"\(1, 3, 4\).*\(1, 1\).*\[B, 1 \+ K, D\]"),
    "rows-alone": ({"tokens_BND": torch.ones(2, 4)}, r"\(2, 4\).*\[B, 1 \+ K, D\]"),
    "mask-token-of-another-width": ({"mask_token_D": torch.ones(3)}, r"mask token \(3,\)"),
    "positions-of-another-width": ({"positions_LD": torch.ones(4, 3)}, r"positions \(4, 3\)"),
    "fewer-places-than-tokens": ({"positions_LD": torch.ones(1, 4)}, r"positions \(1, 4\)"),
    "prefix-below-zero": ({"num_prefix": -1, "visible_BK": ONE_ID.expand(1, 3)}, r"\[B, -1 \+ K, D\]"),
    "int32": ({"visible_BK": ONE_ID.int()}, "int32; pass int64"),
    "tokens-sliced": ({"tokens_BND": torch.ones(1, 2, 8)[..., ::2]}, "contiguous"),
    "positions-transposed": ({"positions_LD": torch.ones(4, 4).t()}, "contiguous"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "tokens_BND": torch.ones(1, 2, 4),
        "mask_token_D": torch.ones(4),
        "positions_LD": torch.ones(4, 4),
        "visible_BK": ONE_ID,
    }
    with pytest.raises(ValueError, match=message):
        assemble_decoder_tokens(**(good | change))


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("shape", [(128, 196, 49, 1, 512), (127, 144, 36, 1, 512)], ids=["image", "volume"])
def test_cuda_path_on_real_batches(shape: tuple[int, ...], dtype: torch.dtype, others: torch.dtype) -> None:
    made = Inputs.make(shape, dtype, others)
    visible, grad = made.visible.cuda(), made.grad.cuda()

    def by_reference(at: torch.dtype) -> list[Tensor]:
        leaves = [leaf.detach().cuda().to(at) for leaf in made.leaves()]
        out = assemble_decoder_tokens_reference(*leaves, visible, 1)
        return [out, *assemble_decoder_tokens_backward_reference(grad.to(at), visible, 1, True)]

    before = launch_counts.copy()
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in made.leaves()]
    out = assemble_decoder_tokens(*leaves, visible)
    grads = torch.autograd.grad(out, leaves, grad)
    for name in ("assemble_decoder_tokens", "assemble_decoder_tokens_backward"):
        assert launch_counts[name] == before[name] + 1
    eager = cast(by_reference(FP32), dtype, dtype, others, others)
    compare("CUDA path", [out.detach(), *grads], eager, by_reference(torch.float64))
    torch.library.opcheck(torch.ops.mnemos.assemble_decoder_tokens, (*leaves, visible, 1))
