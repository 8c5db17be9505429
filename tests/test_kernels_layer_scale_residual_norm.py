"""layer_scale_residual_norm: reference, custom op and device code, forward and backward, against the formulas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.layer_scale_residual_norm import (
    MAX_WIDTH,
    launch_layer_scale_residual_norm,
    launch_layer_scale_residual_norm_backward,
    layer_scale_residual_norm,
)

EPS = 1e-5
OP = torch.ops.mnemos.layer_scale_residual_norm
NAMES = ("x_new", "normed", "grad x", "grad branch", "grad weight", "grad bias", "grad scale")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: shape of the residual stream, and which of the optional inputs it has."""

    shape: tuple[int, ...]
    scale: bool = True
    runs: int = 0  # length of keep; 0: none
    parameters: torch.dtype | None = None  # None: the type of x

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the arguments of a call by name, x with a mean that is not zero."""
        g = torch.Generator().manual_seed(2)
        x, branch = (torch.randn(*self.shape, generator=g).to(dtype) for _ in range(2))
        vectors = [torch.randn(self.shape[-1], generator=g).to(self.parameters or dtype) for _ in range(3)]
        keep = (torch.rand(self.runs, generator=g) < 0.7).float() / 0.7
        made = {
            "x": x + 2.0,
            "branch": branch,
            "weight": vectors[0],
            "bias": vectors[1],
            "scale": vectors[2] if self.scale else None,
            "keep": keep if self.runs else None,
        }
        return {name: None if value is None else value.to(device) for name, value in made.items()}

    def upstream(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1)
        x_new, normed = (torch.randn(*self.shape, generator=g).to(device, dtype) for _ in range(2))
        return x_new, normed


def residual(x: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tensor:
    if keep is not None:
        rows = keep.to(x.dtype).repeat_interleave(x.shape[:-1].numel() // len(keep))
        branch = branch * rows.view(*x.shape[:-1], 1)
    return (x + (branch if scale is None else scale * branch)).to(x.dtype)


def by_formula(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the definition, written out."""
    x_new = residual(x, branch, scale, keep)
    centred = x_new - x_new.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return x_new, centred / (variance + EPS).sqrt() * weight + bias


def by_eager(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what a model written without the op computes."""
    x_new = residual(x, branch, scale, keep)
    return x_new, layer_norm(x_new, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)


def ours(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    return layer_scale_residual_norm(x, branch, scale, keep, weight, bias, EPS)


def through_op(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Take the custom op on a CPU too, where the public function leaves it out."""
    x_new, normed, _, _ = OP(x, branch, scale, keep, weight, bias, EPS)
    return x_new, normed


def run(
    fn: Callable[..., tuple[Tensor, Tensor]],
    made: dict[str, Any],
    upstream: tuple[Tensor, Tensor],
    at: torch.dtype | None = None,
) -> list[Tensor]:
    """Return outputs and gradients in the order of NAMES; `at` computes in another type."""
    leaves = {
        name: value.detach().to(at or value.dtype, copy=True).requires_grad_()
        for name, value in made.items()
        if name != "keep" and value is not None
    }
    out = fn(**{"scale": None, "keep": made["keep"], **leaves})
    grads = torch.autograd.grad(out, list(leaves.values()), [grad.to(out[0].dtype) for grad in upstream])
    return [*(tensor.detach() for tensor in out), *grads]


def followed_by_nan(tensor: Tensor | None) -> Tensor | None:
    """Return a copy behind which memory holds NaN, so that reading too far shows."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    room = torch.full((tensor.numel() + 4096,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return room[: tensor.numel()].copy_(tensor.flatten()).view_as(tensor)


def by_device_code(made: dict[str, Any], upstream: tuple[Tensor | None, Tensor]) -> list[Tensor]:
    """Return outputs and gradients in the order of NAMES, straight from the launch functions."""
    x, branch, weight, bias, scale, keep = (followed_by_nan(made[name]) for name in made)
    grad_x_new, grad_normed = (followed_by_nan(grad) for grad in upstream)
    before = dict(launch_counts)
    x_new, normed, mean, rstd = launch_layer_scale_residual_norm(x, branch, scale, keep, weight, bias, EPS)
    args = (followed_by_nan(x_new), branch, scale, keep, weight, followed_by_nan(mean), followed_by_nan(rstd))
    grads = launch_layer_scale_residual_norm_backward(grad_x_new, grad_normed, *args)
    for name in ("layer_scale_residual_norm", "layer_scale_residual_norm_backward"):
        assert launch_counts[name] == before.get(name, 0) + 1
    grad_x, grad_branch, grad_scale, grad_weight, grad_bias = grads
    assert mean.dtype == rstd.dtype == torch.float32
    assert (grad_branch.numel() == 0) == (scale is None and keep is None)
    assert (grad_scale.numel() == 0) == (scale is None)
    results = [x_new, normed, grad_x, grad_branch if grad_branch.numel() else grad_x, grad_weight, grad_bias]
    return results if scale is None else [*results, grad_scale]


CASES = [
    pytest.param(Case(shape=(3, 5, 7), runs=3), id="B3-L5-D7"),
    pytest.param(Case(shape=(3, 5, 7), scale=False, runs=3), id="B3-L5-D7-no-scale"),
    pytest.param(Case(shape=(3, 5, 7)), id="B3-L5-D7-no-keep"),
    pytest.param(Case(shape=(3, 5, 7), scale=False), id="B3-L5-D7-neither"),
    pytest.param(Case(shape=(12, 33), runs=4), id="rows12-keep4-D33"),
    pytest.param(Case(shape=(1, 1, 3), runs=1), id="smallest"),
    pytest.param(Case(shape=(2, 17, 192), runs=2), id="sample-encoder"),
    pytest.param(Case(shape=(2, 17, 192), runs=2, parameters=torch.float32), id="sample-fp32-parameters"),
    pytest.param(Case(shape=(1, 65, 128), scale=False), id="sample-decoder"),
    pytest.param(Case(shape=(2, 50, 768), runs=2), id="base-image"),
    pytest.param(Case(shape=(1, 37, 768), runs=37), id="base-packed-text"),
    pytest.param(Case(shape=(1, 145, 512), scale=False), id="base-volume-decoder"),
    pytest.param(Case(shape=(2, 3, 1024), runs=2), id="large"),
    pytest.param(Case(shape=(2, 2, 1280), runs=2), id="huge"),
    pytest.param(Case(shape=(2, 2, 1408), runs=2), id="giant"),
]


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_device_code_and_public_function_match_the_formula(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    made, upstream = case.inputs(dtype), case.upstream(dtype)
    oracle = run(by_formula, made, upstream, torch.float64)
    eager = run(by_eager, made, upstream)
    on_device = [
        tensor.cpu() for tensor in by_device_code(case.inputs(dtype, device), case.upstream(dtype, device))
    ]
    results = {"device code": on_device, "public function": run(ours, made, upstream)}
    results["custom op"] = run(through_op, made, upstream)
    for what, tensors in results.items():
        for name, *three in zip(NAMES, tensors, eager, oracle, strict=False):
            assert_as_accurate_as_eager(f"{what}, {name}", *three)
        assert len(tensors) == len(oracle)


@DTYPES
def test_the_statistics_are_those_of_the_stored_stream(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(shape=(2, 17, 192), runs=2)
    for fn, where in ((launch_layer_scale_residual_norm, device), (OP, "cpu")):
        made = case.inputs(dtype, where)
        order = (made[name] for name in ("x", "branch", "scale", "keep", "weight", "bias"))
        x_new, _, mean, rstd = (tensor.cpu() for tensor in fn(*order, EPS))
        rows = x_new.double().view(34, 192)
        torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-5, atol=1e-6)
        expected = (rows.var(1, correction=0) + EPS).rsqrt()
        torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=0)


@DTYPES
@pytest.mark.parametrize("case", [Case(shape=(3, 5, 7), runs=3), Case(shape=(3, 5, 7), scale=False)])
@pytest.mark.parametrize("used", [0, 1], ids=["only-x_new-used", "only-normed-used"])
def test_an_unused_output_counts_for_nothing(
    used: int, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    made, (grad_x_new, grad_normed) = case.inputs(dtype), case.upstream(dtype)
    upstream = (grad_x_new, torch.zeros_like(grad_normed)) if used == 0 else (
        torch.zeros_like(grad_x_new), grad_normed
    )  # fmt: skip
    oracle = run(by_formula, made, upstream, torch.float64)
    eager = run(by_eager, made, upstream)

    def only(fn: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = {k: v.clone().requires_grad_() for k, v in made.items() if k != "keep" and v is not None}
        out = fn(**{"scale": None, "keep": made["keep"], **leaves})
        grads = torch.autograd.grad(out[used], list(leaves.values()), upstream[used], materialize_grads=True)
        return [*(tensor.detach() for tensor in out), *grads]

    results = [only(ours), only(through_op)]
    if used == 1:
        tensors = by_device_code(case.inputs(dtype, device), (None, grad_normed.to(device)))
        results.append([tensor.cpu() for tensor in tensors])
    for tensors in results:
        for name, *three in zip(NAMES, tensors, eager, oracle, strict=False):
            assert_as_accurate_as_eager(name, *three)


def test_expanded_upstream_gradients_are_taken() -> None:
    made = Case(shape=(3, 5, 7), runs=3).inputs(torch.float32)
    made = {name: value.requires_grad_(name != "keep") for name, value in made.items()}

    def grads(fn: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        x_new, normed = fn(**made)
        return torch.autograd.grad(x_new.sum() + normed[..., 0].sum(), [made["x"], made["scale"]])

    torch.testing.assert_close(grads(through_op), grads(by_formula), rtol=1e-4, atol=1e-5)


@DTYPES
def test_a_dropped_branch_leaves_no_trace(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(shape=(2, 3, 4), runs=2)
    made = case.inputs(dtype) | {"keep": torch.tensor([0.0, 2.0])}
    made["branch"][0] = 1e30
    upstream = case.upstream(dtype)
    on_device = {name: value.to(device) for name, value in made.items()}
    for results in (
        run(ours, made, upstream),
        run(through_op, made, upstream),
        [tensor.cpu() for tensor in by_device_code(on_device, [grad.to(device) for grad in upstream])],
    ):
        x_new, _, _, grad_branch, _, _, grad_scale = results
        assert x_new[0].equal(made["x"][0]) and grad_branch[0].eq(0).all()
        assert not x_new[1].equal(made["x"][1]) and grad_branch[1].ne(0).all()
        assert grad_scale.abs().max() < 1e3


def test_bf16_statistics_are_fp32_in_forward_and_backward(device: torch.device) -> None:
    """The mean of 256 and 258 is no bf16 number; kept as one, it would turn -1, 1 into -2, 0 or 0, 2."""
    x = 256.0 + 2.0 * (torch.arange(64) % 2).to(torch.bfloat16).view(1, 1, 64)
    weight, zeros = torch.ones(64, dtype=torch.bfloat16), torch.zeros_like(x[0, 0])
    made = {
        "x": x,
        "branch": torch.zeros_like(x),
        "weight": weight,
        "bias": zeros,
        "scale": zeros,
        "keep": None,
    }
    upstream = (torch.zeros_like(x), torch.ones_like(x))
    on_device = {name: None if value is None else value.to(device) for name, value in made.items()}
    expected = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16).repeat(32)
    for results in (
        run(ours, made, upstream),
        run(through_op, made, upstream),
        [tensor.cpu() for tensor in by_device_code(on_device, [grad.to(device) for grad in upstream])],
    ):
        # one rounding step of bf16: Triton's interpreter rounds towards 0
        torch.testing.assert_close(results[1].flatten(), expected, rtol=0.004, atol=0)
        torch.testing.assert_close(results[4], expected, rtol=0.004, atol=0)


def test_gradients_of_fp32_parameters_keep_fp32_digits_in_a_bf16_stream(device: torch.device) -> None:
    """Nothing on the way from bf16 rows to an fp32 sum over them is rounded to bf16."""
    case = Case(shape=(2, 40, 192), runs=2, parameters=torch.float32)
    upstream = case.upstream(torch.bfloat16)
    # with a scale of 0 the stored stream is x itself, exactly
    made = case.inputs(torch.bfloat16) | {"scale": torch.zeros(192), "keep": torch.tensor([0.5, 2.0])}
    on_device = {name: value.to(device) for name, value in made.items()}
    device_code = by_device_code(on_device, [grad.to(device) for grad in upstream])
    oracle = run(by_formula, made, upstream, torch.float64)
    for results, exact in (
        ([tensor.cpu() for tensor in device_code], NAMES[4:]),
        (run(through_op, made, upstream), NAMES[4:]),
        (run(ours, made, upstream), NAMES[4:6]),  # on a CPU the scale meets the branch in its type
    ):
        for name in exact:
            got, expected = results[NAMES.index(name)], oracle[NAMES.index(name)]
            assert got.dtype == torch.float32
            error = (got.double() - expected).abs().max()
            assert error <= 2e-6 * expected.abs().max(), f"{name}: {error:.3e} of {expected.abs().max():.3e}"


@DTYPES
@pytest.mark.parametrize("runs", [0, 2], ids=["no-keep", "keep"])
@pytest.mark.parametrize("scale", [False, True], ids=["no-scale", "scale"])
def test_registered_as_custom_ops(scale: bool, runs: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(shape=(2, 3, 8), scale=scale, runs=runs)
    made = case.inputs(dtype, device)
    leaves = {k: v if v is None or k == "keep" else v.requires_grad_() for k, v in made.items()}
    args = tuple(leaves[name] for name in ("x", "branch", "scale", "keep", "weight", "bias"))
    torch.library.opcheck(OP, (*args, EPS))
    with torch.no_grad():
        x_new, _, mean, rstd = OP(*args, EPS)
        rest = (x_new, *(value if value is None else value.detach() for value in args[1:5]), mean, rstd)
        torch.library.opcheck(
            torch.ops.mnemos.layer_scale_residual_norm_backward, (*case.upstream(dtype, device), *rest)
        )


class PreNorm(nn.Module):
    """Linear, op, GELU, linear, op: the pieces of a block."""

    def __init__(self, fn: Callable[..., tuple[Tensor, Tensor]], width: int) -> None:
        super().__init__()
        self.fn = fn
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.norm_1
        x, normed = self.fn(x, self.linear_1(x), norm.weight, norm.bias, self.scale, keep)
        norm = self.norm_2
        return self.fn(x, self.linear_2(gelu(normed)), norm.weight, norm.bias, None, None)


def check_compiled(
    block: PreNorm, shape: tuple[int, int, int], backend: str, device: str, rtol: float
) -> None:
    """Fail unless one graph holds the block and gives eager's results and gradients."""
    block.to(device)
    g = torch.Generator().manual_seed(2)
    x, *upstream = (torch.randn(*shape, generator=g).to(device) for _ in range(3))
    keep = torch.tensor([2.0, 0.0] * (shape[0] // 2), device=device)

    def results(fn: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = fn(leaf, keep)
        return [*out, *torch.autograd.grad(out, [leaf, *block.parameters()], upstream)]

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    torch.testing.assert_close(results(compiled), results(block), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("fn", [ours, through_op], ids=["public-function", "custom-op"])
def test_compiles_into_one_graph(fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
    check_compiled(PreNorm(fn, 24), (4, 5, 24), "aot_eager", "cpu", 1e-6)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "branch-of-another-shape": ({"branch": torch.zeros(2, 3, 5)}, r"\(2, 3, 4\).*\(2, 3, 5\)"),
    "branch-of-another-type": (
        {"branch": torch.zeros(2, 3, 4).bfloat16()},
        r"float32.*bfloat16.*one floating type",
    ),
    "bias-of-another-width": ({"bias": torch.zeros(5)}, r"\[4\].*\(5,\)"),
    "scale-of-another-width": ({"scale": torch.zeros(1, 4)}, r"\[4\].*\(1, 4\)"),
    "bias-of-another-type": ({"bias": torch.zeros(4).bfloat16()}, "bfloat16"),
    "keep-of-another-batch": ({"keep": torch.ones(4)}, r"keep torch.float32 \(4,\).*divisor of the 6 rows"),
    "keep-of-another-type": ({"keep": torch.ones(2).bfloat16()}, "keep torch.bfloat16.*fp32"),
    "keep-with-two-axes": ({"keep": torch.ones(2, 1)}, r"\(2, 1\)"),
    "empty-keep": ({"keep": torch.ones(0)}, r"\(0,\)"),
    "learned-keep": ({"keep": torch.ones(2, requires_grad=True)}, "take no gradient"),
    "no-rows": ({"x": torch.zeros(0, 3, 4), "branch": torch.zeros(0, 3, 4)}, "at least one row"),
    "too-wide": ({name: torch.zeros(1, MAX_WIDTH + 1) for name in ("x", "branch")}, f"1 to {MAX_WIDTH}"),
    "x-not-contiguous": ({"x": torch.zeros(2, 3, 8)[..., ::2]}, "contiguous"),
    "branch-not-contiguous": ({"branch": torch.zeros(3, 2, 4).transpose(0, 1)}, "contiguous"),
    "keep-not-contiguous": ({"keep": torch.zeros(2, 2)[:, 0]}, "contiguous"),
    "weight-not-contiguous": ({"weight": torch.zeros(8)[::2]}, "contiguous"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good = Case(shape=(2, 3, 4), runs=2).inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        ours(**(good | change))


REAL_CASES = [
    pytest.param(Case(shape=(128, 50, 768), runs=128), id="base-image"),
    pytest.param(Case(shape=(128, 37, 768)), id="base-volume-no-keep"),
    pytest.param(Case(shape=(128, 197, 512), scale=False), id="base-image-decoder"),
    pytest.param(Case(shape=(128, 145, 512), scale=False), id="base-volume-decoder"),
    pytest.param(Case(shape=(1, 9601, 768), runs=9601), id="base-packed-text"),
    pytest.param(Case(shape=(128, 50, 768), runs=128, parameters=torch.float32), id="fp32-parameters"),
    pytest.param(Case(shape=(64, 50, 1024), runs=64), id="large"),
    pytest.param(Case(shape=(64, 50, 1280), runs=64), id="huge"),
    pytest.param(Case(shape=(64, 50, 1408), runs=64), id="giant"),
    pytest.param(Case(shape=(3, 5, 7), runs=3), id="odd"),
    pytest.param(Case(shape=(5, 77, MAX_WIDTH), runs=5), id="widest"),
]


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", REAL_CASES)
def test_cuda_path_on_real_shapes(case: Case, dtype: torch.dtype) -> None:
    made, upstream = case.inputs(dtype, "cuda"), case.upstream(dtype, "cuda")
    before = launch_counts["layer_scale_residual_norm_backward"]
    tensors = run(ours, made, upstream)
    assert launch_counts["layer_scale_residual_norm_backward"] == before + 1
    eager, oracle = run(by_eager, made, upstream), run(by_formula, made, upstream, torch.float64)
    for name, *three in zip(NAMES, tensors, eager, oracle, strict=False):
        assert_as_accurate_as_eager(name, *three)


@pytest.mark.gpu
def test_offsets_past_31_bits() -> None:
    """The last row lies more than 2**31 values from the first."""
    rows, D = 2**31 // 512 + 64, 512
    x = torch.zeros(rows, D, dtype=torch.bfloat16, device="cuda")
    branch = torch.zeros_like(x)
    branch[-1] = torch.arange(D, device="cuda") % 7
    ones = torch.ones(D, dtype=torch.bfloat16, device="cuda")
    x_new, _, mean, rstd = launch_layer_scale_residual_norm(x, branch, None, None, ones, ones, EPS)
    assert x_new[-1].equal(branch[-1]) and not x_new[:-1].any()
    args = (x_new, None, None, None, ones, mean, rstd)
    grad_x, *_ = launch_layer_scale_residual_norm_backward(branch, torch.zeros_like(x), *args)
    assert grad_x[-1].equal(branch[-1]) and not grad_x[:-1].any()


@pytest.mark.gpu
def test_compiles_on_cuda() -> None:
    check_compiled(PreNorm(ours, 768), (4, 50, 768), "inductor", "cuda", 1e-3)
