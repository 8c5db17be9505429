"""cross_attention against the formula in fp64, forward and backward; what it takes and what it refuses."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_eager
from torch import Tensor

from mnemos.kernels._common import attention_products
from mnemos.kernels.attention import attention
from mnemos.kernels.cross_attention import BACKENDS, cross_attention

module = importlib.import_module("mnemos.kernels.cross_attention")  # the function of the same name hides it
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
SHAPES = [
    pytest.param(2, 147, 197, 2, 32, id="decoder-image"),
    pytest.param(3, 108, 145, 2, 32, id="decoder-volume"),
    pytest.param(2, 48, 65, 4, 32, id="sample-decoder"),
    pytest.param(2, 1, 50, 3, 64, id="one-query"),
    pytest.param(2, 5, 1, 2, 8, id="one-key"),
    pytest.param(1, 7, 3, 1, 1, id="width-1-fewer-keys"),
    pytest.param(3, 37, 37, 1, 88, id="as-many-queries-as-keys"),
]


def inputs(B: int, M: int, L: int, H: int, W: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, and an upstream gradient."""
    generator = torch.Generator().manual_seed(L + W)
    shapes = ((B, M, H, W), (B, L, 2, H, W), (B, M, H, W))
    q, kv, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, kv, upstream


def oracle(q: Tensor, kv: Tensor) -> Tensor:
    """Loop over samples and heads."""
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            k, v = kv[b, :, 0, h], kv[b, :, 1, h]
            weight = torch.exp((q[b, :, h, None] * k).sum(-1) / q.shape[-1] ** 0.5)
            out.append((weight / weight.sum(1, keepdim=True)) @ v)
    return torch.stack(out).unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def eager(q: Tensor, kv: Tensor, backend: str) -> Tensor:
    """Return the plain formula in one dtype; for sdpa torch's own kernel, which adds up in blocks."""
    q, k, v = (x.transpose(1, 2) for x in (q, *kv.unbind(2)))
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def with_gradient(
    function: Callable[[Tensor, Tensor], Tensor], q: Tensor, kv: Tensor, upstream: Tensor
) -> tuple[Tensor, ...]:
    """Return the output for copies of the inputs, and their gradients as they arrive."""
    q, kv = q.clone().requires_grad_(), kv.clone().requires_grad_()
    out = function(q, kv)
    return out.detach(), *torch.autograd.grad(out, (q, kv), upstream.to(out.dtype))


def compare(q: Tensor, kv: Tensor, upstream: Tensor, backend: str) -> bool:
    """Hold a backend's output and gradients to the rule of compare.py; return whether all were finite."""
    got = with_gradient(lambda q, kv: cross_attention(q, kv, backend=backend), q, kv, upstream)
    plain = with_gradient(lambda q, kv: eager(q, kv, backend), q, kv, upstream)
    exact = with_gradient(oracle, q.double(), kv.double(), upstream)
    for name, *values in zip(("out", "queries", "keys and values"), got, plain, exact, strict=True):
        assert_as_accurate_as_eager(f"{backend} {name}", *values)
    return all(bool(value.isfinite().all()) for value in got)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "M", "L", "H", "W"), SHAPES)
def test_matches_a_loop(B: int, M: int, L: int, H: int, W: int, dtype: torch.dtype, backend: str) -> None:
    assert compare(*inputs(B, M, L, H, W, dtype), backend)


@pytest.mark.parametrize("num", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_a_loop_with_so_many_samples_at_a_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num: int
) -> None:
    q, kv, upstream = inputs(5, 6, 9, 2, 8, dtype)
    bytes_of_a_sample = 2 * 6 * 9 * dtype.itemsize
    monkeypatch.setattr(attention_products, "SCORE_BYTES", num * bytes_of_a_sample)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    heads: list[int] = []
    real = attention_products._softmax
    monkeypatch.setattr(attention_products, "_softmax", lambda rows: heads.append(len(rows)) or real(rows))
    compare(q, kv, upstream, "definition")
    assert heads == [2 * min(num, 5 - start) for start in range(0, 5, num)]


def test_more_threads_take_more_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "SCORE_BYTES", 100)
    like = torch.zeros(1)
    for threads, step in ((1, 1), (2, 2), (3, 3), (8, 7)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        got = list(attention_products._samples_at_a_time(like, 7, 25))
        assert got == [slice(start, min(7, start + step)) for start in range(0, 7, step)]
    assert list(attention_products._samples_at_a_time(like.to("meta"), 7, 10**6)) == [slice(0, 7)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_the_derivative(backend: str) -> None:
    q, kv, _ = inputs(2, 3, 5, 2, 4, torch.float64)

    def function(q: Tensor, kv: Tensor) -> Tensor:
        return cross_attention(q, kv, backend=backend)

    assert torch.autograd.gradcheck(function, (q.requires_grad_(), kv.requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_some_rows_of_self_attention(backend: str) -> None:
    qkv = torch.randn(3, 17, 3, 2, 8)
    rows = torch.tensor([16, 0, 5, 9])
    some = cross_attention(qkv[:, rows, 0].contiguous(), qkv[:, :, 1:].contiguous(), backend=backend)
    torch.testing.assert_close(some, attention(qkv, backend="definition")[:, rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_keys_and_values_lies_as_they_do(backend: str) -> None:
    q, kv, upstream = inputs(3, 4, 7, 2, 8, torch.float32)
    _, _, grad_kv = with_gradient(lambda q, kv: cross_attention(q, kv, backend=backend), q, kv, upstream)
    assert grad_kv.is_contiguous() and grad_kv.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_of_any_strides_is_taken(backend: str) -> None:
    q, kv, _ = inputs(2, 3, 5, 2, 8, torch.float32)

    def function(q: Tensor, kv: Tensor) -> Tensor:
        return cross_attention(q, kv, backend=backend)

    one = torch.ones(()).expand(q.shape)  # a sum's gradient: strides of zero
    got, plain = (with_gradient(function, q, kv, upstream) for upstream in (one, one.contiguous()))
    for left, right in zip(got, plain, strict=True):
        torch.testing.assert_close(left, right)


def test_a_sample_of_what_is_not_finite_shows_it_and_harms_no_other() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for bad in (float("nan"), float("inf")):
            q, kv, _ = inputs(3, 4, 40, 2, 8, dtype)
            kv[1, 7, 0, 0, 3] = bad
            out = cross_attention(q, kv, backend="definition")
            shown = (
                q[1, :, 0, 3] > 0 if bad == float("inf") else torch.ones(4, dtype=torch.bool)
            )  # else weight 0
            assert shown.any() and torch.equal(out[1, :, 0].isnan(), shown[:, None].expand(4, 8))
            assert out[[0, 2]].isfinite().all() and out[1, :, 1].isfinite().all()


def test_auto_takes_the_definition_on_a_cpu_and_sdpa_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name, real in BACKENDS.items():
        monkeypatch.setitem(
            BACKENDS, name, lambda q, kv, name=name, real=real: taken.append(name) or real(q, kv)
        )
    q, kv, _ = inputs(1, 2, 3, 1, 8, torch.float32)
    assert cross_attention(q, kv).shape == q.shape
    assert cross_attention(q.to("meta"), kv.to("meta")).shape == q.shape
    assert cross_attention(q, kv, backend="sdpa").shape == q.shape
    assert taken == ["definition", "sdpa", "sdpa"]


def test_is_one_graph_for_a_compiler() -> None:
    given = inputs(2, 4, 6, 2, 8, torch.bfloat16)
    compiled = torch.compile(lambda q, kv: cross_attention(q, kv), backend="aot_eager", fullgraph=True)
    for got, plain in zip(
        with_gradient(compiled, *given), with_gradient(cross_attention, *given), strict=True
    ):
        torch.testing.assert_close(got, plain)


# ---- refusals: what came, what is allowed, what to do
def test_inputs_that_do_not_fit_are_named() -> None:
    q, kv = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 4, 8)
    came = r"\[2, 3, 4, 8\], keys and values \[2, 5, 3, 4, 8\]; they must be floating \[B, M, H, W\]"
    with pytest.raises(ValueError, match=came):
        cross_attention(q, torch.randn(2, 5, 3, 4, 8))
    others = (kv[:1], kv[:, :, :, :3], kv[..., :7], kv[:, :0], kv[:, :, 0], kv[None])
    for other in others:
        with pytest.raises(ValueError, match=r"of the same B, H and W with L >= 1"):
            cross_attention(q, other.contiguous())
    with pytest.raises(ValueError, match=r"\[3, 4, 8\], keys"):
        cross_attention(q[0], kv)
    with pytest.raises(ValueError, match=r"torch.int64 \[2, 3, 4, 8\]"):
        cross_attention(q.long(), kv.long())
    with pytest.raises(ValueError, match=r"queries are torch.float32 on cpu, keys and values torch.bfloat16"):
        cross_attention(q, kv.bfloat16())
    with pytest.raises(ValueError, match=r"keys and values torch.float32 on meta; .*one device"):
        cross_attention(q, kv.to("meta"))
    for left, right in (
        (q.transpose(0, 1).contiguous().transpose(0, 1), kv),
        (q, kv.flip(0).mT.contiguous().mT),
    ):
        with pytest.raises(ValueError, match=r"must be contiguous; call \.contiguous\(\)"):
            cross_attention(left, right)


def test_an_unknown_backend_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'varlen'; it must be auto, definition, sdpa"):
        cross_attention(torch.randn(1, 2, 1, 8), torch.randn(1, 3, 2, 1, 8), backend="varlen")
