"""place_tokens: reference and device code, forward and backward, against a loop over places."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.place_tokens import (
    launch_place_tokens,
    launch_place_tokens_backward,
    place_tokens,
    place_tokens_backward_reference,
    place_tokens_reference,
)

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
SHAPES = [
    pytest.param((1, 1, 1, 0, 1), id="smallest"),
    pytest.param((2, 5, 3, 0, 7), id="no-prefix"),
    pytest.param((3, 9, 9, 1, 4), id="all-visible"),
    pytest.param((2, 9, 0, 1, 4), id="nothing-visible"),
    pytest.param((2, 6, 0, 0, 8), id="no-token-at-all"),
    pytest.param((5, 19, 1, 2, 40), id="two-in-front-one-visible"),
    pytest.param((2, 7, 2, 9, 300), id="more-in-front-than-a-tile"),
    pytest.param((21, 3, 2, 1, 8), id="samples-in-uneven-parts"),
    pytest.param((5, 7, 2, 1, 512), id="decoder-width"),
    pytest.param((1, 5, 2, 1, 1536), id="qkv-width"),
    pytest.param((1, 70, 66, 1, 40), id="more-visible-than-compared-at-once"),
    pytest.param((1, 144, 36, 1, 64), id="places-of-a-volume"),
]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch and the gradient that comes back for it."""

    tokens: Tensor
    table: Tensor
    visible: Tensor
    num_prefix: int
    grad: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Inputs":
        B, places, K, prefix, D = shape
        g = torch.Generator().manual_seed(places + D)
        visible = torch.stack([torch.randperm(places, generator=g)[:K] for _ in range(B)])  # in no order
        return cls(
            tokens=torch.randn(B, prefix + K, D, generator=g).to(dtype),
            table=torch.randn(places, D, generator=g).to(dtype),
            visible=visible,
            num_prefix=prefix,
            grad=(torch.randn(B, prefix + places, D, generator=g) + 0.5).to(dtype),
        )

    def leaves(self) -> list[Tensor]:
        return [tensor.clone().requires_grad_() for tensor in (self.tokens, self.table)]


def by_loop(made: Inputs, at: torch.dtype) -> list[Tensor]:
    """Return the output and two gradients, added up sample by sample in `at`; nothing is rounded before the end."""
    tokens, table, grad, prefix = made.tokens.to(at), made.table.to(at), made.grad.to(at), made.num_prefix
    out, grad_tokens = torch.full_like(grad, torch.nan), torch.full_like(tokens, torch.nan)
    grad_table = torch.zeros_like(table)
    for b, visible in enumerate(made.visible.tolist()):
        out[b, :prefix], grad_tokens[b, :prefix] = tokens[b, :prefix], grad[b, :prefix]
        for place in range(len(table)):
            row = prefix + place
            if place in visible:
                token = prefix + visible.index(place)
                out[b, row], grad_tokens[b, token] = tokens[b, token], grad[b, row]
            else:
                out[b, row] = table[place]
                grad_table[place] += grad[b, row]
    return [out, grad_tokens, grad_table]


def compare(what: str, ours: list[Tensor], made: Inputs) -> None:
    oracle, eager = by_loop(made, torch.float64), by_loop(made, FP32)[2].to(made.table.dtype)
    ours = [result.detach().cpu() for result in ours]
    for name, copied, expected in zip(("out", "gradient of tokens"), ours, oracle, strict=False):
        assert copied.dtype == made.tokens.dtype and copied.double().equal(expected), f"{what}: {name}"
    assert_as_accurate_as_eager(f"{what}: gradient of the table", ours[2], eager, oracle[2])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_device_code_and_public_function_match_a_loop(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    made = Inputs.make(shape, dtype)
    before = launch_counts.copy()
    visible = made.visible.to(device)
    out = launch_place_tokens(made.tokens.to(device), made.table.to(device), visible, made.num_prefix)
    grads = launch_place_tokens_backward(made.grad.to(device), visible, made.num_prefix, True)
    for name in ("place_tokens", "place_tokens_backward"):
        assert launch_counts[name] == before[name] + 1
    compare("device code", [out, *grads], made)

    leaves = made.leaves()
    out = place_tokens(*leaves, made.visible, num_prefix=made.num_prefix)
    compare("public function", [out, *torch.autograd.grad(out, leaves, made.grad)], made)


def test_the_tables_gradient_is_summed_in_fp32(device: torch.device) -> None:
    """300 ones: a sum in bf16 stays at 256, where its steps become 2."""
    grad, visible = torch.ones(300, 3, 8, dtype=BF16), torch.zeros(300, 1, dtype=torch.int64)
    for ours in (
        launch_place_tokens_backward(grad.to(device), visible.to(device), 1, True),
        place_tokens_backward_reference(grad, visible, 1, True),
    ):
        assert ours[1].dtype == BF16 and ours[1][0].eq(0).all() and ours[1][1].eq(300).all()


class Calls(TorchDispatchMode):
    """Collects the operators called and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def test_a_table_that_takes_no_gradient_costs_none(device: torch.device) -> None:
    made = Inputs.make((3, 9, 3, 2, 8), FP32)
    expected = by_loop(made, FP32)[1]
    launched = launch_place_tokens_backward(made.grad.to(device), made.visible.to(device), 2, False)
    assert launched[0].cpu().equal(expected) and launched[1].numel() == 0

    tokens, table = made.leaves()
    for leaf, wanted in ((table.detach(), False), (table, True)):
        out = place_tokens(tokens, leaf, made.visible, num_prefix=2)
        with Calls() as calls:
            (grad,) = torch.autograd.grad(out, tokens, made.grad)
        (args,) = (args for name, args in calls.seen if name == "mnemos::place_tokens_backward")
        assert grad.equal(expected) and args[3] is wanted


def test_gradients_of_seen_places_do_not_leak_into_the_table(device: torch.device) -> None:
    grad, visible = torch.full((2, 20, 5), torch.nan), torch.tensor([[11, 2], [2, 7]])
    for b, places in enumerate(visible.tolist()):
        grad[b, [1 + place for place in range(19) if place not in places]] = 1.0
    count = torch.tensor([2.0 - (visible == place).sum() for place in range(19)])
    for ours in (
        launch_place_tokens_backward(grad.to(device), visible.to(device), 1, True),
        place_tokens_backward_reference(grad, visible, 1, True),
    ):
        assert ours[0].isnan().all() and ours[1].cpu().equal(count[:, None].expand(19, 5))


def test_gradient_without_rows_is_taken() -> None:
    made = Inputs.make((2, 9, 3, 1, 8), FP32)
    leaves = made.leaves()
    grads = torch.autograd.grad(place_tokens(*leaves, made.visible).sum(), leaves)
    assert grads[0].eq(1).all() and grads[1].sum() == 2 * 6 * 8
    turned = made.grad.transpose(1, 2).contiguous().transpose(1, 2)
    grads = torch.autograd.grad(place_tokens(*leaves, made.visible), leaves, turned)
    assert grads[0].equal(by_loop(made, FP32)[1])


def test_reference_can_be_differentiated() -> None:
    made = Inputs.make((2, 6, 3, 1, 4), torch.float64)
    for op in (place_tokens_reference, torch.ops.mnemos.place_tokens):
        assert torch.autograd.gradcheck(lambda *leaves, op=op: op(*leaves, made.visible, 1), made.leaves())


@DTYPES
def test_registered_as_a_custom_op(dtype: torch.dtype) -> None:
    made = Inputs.make((2, 9, 3, 1, 8), dtype)
    tokens, table = made.leaves()
    for leaf in (table, table.detach()):
        torch.library.opcheck(torch.ops.mnemos.place_tokens, (tokens, leaf, made.visible, 1))


def test_compiles_as_one_graph() -> None:
    made = Inputs.make((2, 9, 3, 1, 8), FP32)

    def placed(tokens: Tensor, table: Tensor) -> Tensor:
        return place_tokens(tokens * 2, table + 1, made.visible)

    results = []
    for run in (torch.compile(placed, fullgraph=True, backend="aot_eager"), placed):
        leaves = made.leaves()
        out = run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, made.grad)])
    assert all(ours.equal(eager) for ours, eager in zip(*results, strict=True))


ONE_ID = torch.zeros(1, 1, dtype=torch.int64)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "too-many-tokens": ({"tokens_BND": torch.ones(1, 3, 4)}, r"\(1, 3, 4\).*\(1, 1\).*\[B, 1 \+ K, D\]"),
    "rows-alone": ({"tokens_BND": torch.ones(2, 4)}, r"\(2, 4\).*\[B, 1 \+ K, D\]"),
    "table-per-sample": ({"table_LD": torch.ones(1, 3, 4)}, r"table \(1, 3, 4\)"),
    "table-of-another-width": ({"table_LD": torch.ones(3, 5)}, r"table \(3, 5\)"),
    "fewer-places-than-tokens": ({"table_LD": torch.ones(0, 4)}, r"table \(0, 4\).*K at most L"),
    "prefix-below-zero": ({"num_prefix": -1, "visible_BK": ONE_ID.expand(1, 3)}, r"\[B, -1 \+ K, D\]"),
    "table-of-another-type": ({"table_LD": torch.ones(3, 4).double()}, "float64.*float32; cast one"),
    "int32": ({"visible_BK": ONE_ID.int()}, "int32; pass int64"),
    "tokens-sliced": ({"tokens_BND": torch.ones(1, 2, 8)[..., ::2]}, "contiguous"),
    "table-transposed": ({"table_LD": torch.ones(4, 3).t()}, "contiguous"),
    "ids-sliced": (
        {"tokens_BND": torch.ones(1, 3, 4), "visible_BK": torch.arange(4)[None, ::2].expand(1, 2)},
        "contiguous",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "tokens_BND": torch.ones(1, 2, 4),
        "table_LD": torch.ones(3, 4),
        "visible_BK": ONE_ID,
    }
    with pytest.raises(ValueError, match=message):
        place_tokens(**(good | change))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(8, 196, 49, 1, 1536), (128, 196, 49, 1, 512), (127, 144, 36, 1, 1536), (512, 196, 49, 1, 512)],
    ids=["few-samples", "image", "volume-qkv", "many-samples"],
)
def test_cuda_path_on_real_batches(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, places, K, prefix, D = shape
    g = torch.Generator("cuda").manual_seed(B)
    visible = torch.rand(B, places, device="cuda", generator=g).argsort(1)[:, :K].sort(1).values
    tokens, table, grad = (
        torch.randn(rows, device="cuda", generator=g).to(dtype)
        for rows in ((B, prefix + K, D), (places, D), (B, prefix + places, D))
    )
    masked = torch.ones(B, places, 1, dtype=torch.bool, device="cuda").scatter_(1, visible[..., None], False)

    def table_gradient(at: torch.dtype) -> Tensor:
        return torch.where(masked, grad[:, prefix:].to(at), 0).sum(0)

    before = launch_counts.copy()
    leaves = [tokens.requires_grad_(), table.requires_grad_()]
    out = place_tokens(*leaves, visible)
    grads = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for name in ("place_tokens", "place_tokens_backward"):
        assert launch_counts[name] == before[name] + 1
    assert out.equal(place_tokens_reference(*leaves, visible, prefix))
    assert grads[0].equal(place_tokens_backward_reference(grad, visible, prefix, False)[0])
    eager = table_gradient(FP32).to(dtype)
    assert_as_accurate_as_eager("gradient of the table", grads[1], eager, table_gradient(torch.float64))
    assert grads[1].equal(torch.autograd.grad(out, leaves, grad)[1]), "the same sums in every run"
    torch.library.opcheck(torch.ops.mnemos.place_tokens, (*leaves, visible, prefix))
