"""attention against loops in fp64, forward and backward, dense and packed; the rules by which a backend is taken."""

import builtins
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_eager
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mnemos.kernels import packing as packing_module
from mnemos.kernels._common import attention_products
from mnemos.kernels.attention import BACKENDS, TABLE_PATH, attention, choose_backend, refusal
from mnemos.kernels.packing import Packing

module = importlib.import_module(
    "mnemos.kernels.attention"
)  # the function of the same name hides it in no way
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
ON_A_CPU = ("definition", "sdpa")  # with gradients
DENSE = [
    pytest.param(2, 17, 3, 64, id="sample-encoder"),
    pytest.param(1, 65, 4, 32, id="sample-decoder"),
    pytest.param(1, 37, 2, 64, id="volume-encoder"),
    pytest.param(1, 50, 1, 80, id="huge-encoder"),
    pytest.param(1, 145, 1, 88, id="giant-all-patches"),
    pytest.param(1, 197, 2, 32, id="decoder"),
    pytest.param(2, 1, 2, 8, id="one-token"),
    pytest.param(1, 3, 1, 1, id="width-1"),
]
PACKED = [
    pytest.param((5, 1, 9, 4), 2, 16, id="four-texts"),
    pytest.param((7,), 3, 8, id="one-text"),
    pytest.param((1,), 1, 8, id="one-token"),
    pytest.param((112, 61, 75), 1, 64, id="texts-of-the-base-preset"),
    pytest.param((3, 0, 2), 1, 8, id="an-empty-text"),
]


def inputs(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a packed projection [B, L, 3, H, W] and an upstream gradient [B, L, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    B, L, H, W = shape
    qkv = torch.randn(B, L, 3, H, W, generator=generator).to(dtype)
    return qkv, torch.randn(B, L, H, W, generator=generator).to(dtype)


def oracle(qkv: Tensor, lengths: Sequence[int] | None, causal: bool) -> Tensor:
    """Loop over sequences, heads and queries; what a query may not see is left out, not given a weight."""
    B, L, _, H, _ = qkv.shape
    rows = []
    for sequence in qkv[0].split(lengths) if lengths else qkv:
        q, k, v = sequence.unbind(1)
        for at in range(len(sequence)):
            seen = at + 1 if causal else len(sequence)
            for head in range(H):
                weight = torch.exp((k[:seen, head] @ q[at, head]) / q.shape[-1] ** 0.5)
                rows.append((weight / weight.sum()) @ v[:seen, head])
    return torch.stack(rows).view(B, L, H, -1)


def eager(qkv: Tensor, lengths: Sequence[int] | None, causal: bool, backend: str) -> Tensor:
    """Return the plain formula in one dtype, text by text; for a backend that is another's kernel torch's fused one.

    Such a kernel adds up in blocks and may be a little further off than the formula; ours there is the layout only.
    """
    parts = []
    for part in qkv.split(lengths, 1) if lengths else [qkv]:
        q, k, v = (x.transpose(1, 2) for x in part.unbind(2))
        score = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            score = score.masked_fill(score.new_ones(score.shape[-2:]).triu(1).bool(), float("-inf"))
        out = score.softmax(-1) @ v
        if backend != "definition":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, 1)


def with_gradient(function: Callable[..., Tensor], qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output for a copy of qkv, and qkv's gradient."""
    leaf = qkv.clone().requires_grad_()
    out = function(leaf)
    out.backward(upstream.to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def compare(qkv: Tensor, upstream: Tensor, lengths: Sequence[int] | None, causal: bool, backend: str) -> bool:
    """Hold a backend's output and gradient to the rule of compare.py; return whether both were finite."""
    packing = Packing.from_lengths(lengths, qkv.device) if lengths else None

    def ours(qkv: Tensor) -> Tensor:
        return attention(qkv, packing=packing, causal=causal, backend=backend)

    chosen = choose_backend(qkv, packing, causal) if backend == "auto" else backend
    exact = with_gradient(lambda x: oracle(x, lengths, causal), qkv.double().cpu(), upstream.cpu())
    plain = with_gradient(lambda x: eager(x, lengths, causal, chosen), qkv, upstream)
    found = with_gradient(ours, qkv, upstream)
    for name, got, eager_, true in zip(("out", "gradient"), found, plain, exact, strict=True):
        assert_as_accurate_as_eager(f"{backend} {name}", got.cpu(), eager_.cpu(), true)
    return all(bool(value.isfinite().all()) for value in found)


@pytest.mark.parametrize("backend", [*ON_A_CPU, "auto"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "L", "H", "W"), DENSE)
def test_dense_matches_a_loop(
    B: int, L: int, H: int, W: int, dtype: torch.dtype, causal: bool, backend: str
) -> None:
    assert compare(*inputs(B, L, H, W, dtype=dtype), None, causal, backend)


@pytest.mark.parametrize("backend", [*ON_A_CPU, "auto"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "H", "W"), PACKED)
def test_packed_matches_a_loop(
    lengths: tuple[int, ...], H: int, W: int, dtype: torch.dtype, causal: bool, backend: str
) -> None:
    assert compare(*inputs(1, sum(lengths), H, W, dtype=dtype), lengths, causal, backend)


@pytest.mark.parametrize("lengths", [None, (3, 1, 9, 2, 5)], ids=["dense", "packed"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_a_loop_with_few_samples_at_a_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, causal: bool, lengths: Sequence[int] | None
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(attention_products, "SCORE_BYTES", 2 * 3 * 9 * 9 * dtype.itemsize)  # of two samples
    shape = (1, 20, 3, 8) if lengths else (5, 9, 3, 8)
    assert compare(*inputs(*shape, dtype=dtype), lengths, causal, "definition")


@pytest.mark.parametrize("tokens", [3, 37, 50, 96, 197])
def test_bfloat16_matches_a_loop_where_onednn_has_none(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(attention_products, "_onednn_has_bfloat16", lambda: False)
    assert compare(*inputs(1, tokens, 2, 16, dtype=torch.bfloat16), None, False, "definition")


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_the_gradient_of_a_projection_lies_as_it_does(backend: str) -> None:
    qkv, upstream = inputs(2, 9, 2, 8, dtype=torch.float32)
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(attention(qkv, backend=backend), qkv, upstream)
    assert gradient.is_contiguous() and gradient.abs().sum() > 0


@pytest.mark.parametrize("lengths", [None, (3, 1, 2)], ids=["dense", "packed"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_the_written_gradient_is_the_derivative(causal: bool, lengths: Sequence[int] | None) -> None:
    packing = Packing.from_lengths(lengths) if lengths else None
    qkv, _ = inputs(1 if lengths else 2, 6, 2, 5, dtype=torch.float64)

    def definition(qkv: Tensor) -> Tensor:
        return attention(qkv, packing=packing, causal=causal, backend="definition")

    assert torch.autograd.gradcheck(definition, (qkv.requires_grad_(),))


@pytest.mark.parametrize("backend", ON_A_CPU)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_a_text_is_what_it_is_alone_whatever_stands_beside_it(causal: bool, backend: str) -> None:
    lengths = (4, 9, 1, 6)
    qkv, upstream = inputs(1, sum(lengths), 2, 16, dtype=torch.float32)
    packing = Packing.from_lengths(lengths)

    def packed(qkv: Tensor) -> Tensor:
        return attention(qkv, packing=packing, causal=causal, backend=backend)

    def dense(qkv: Tensor) -> Tensor:
        return attention(qkv, causal=causal, backend=backend)

    begin = 0
    for length in lengths:
        mine = slice(begin, begin := begin + length)
        wild = torch.full_like(qkv, float("nan"))
        wild[:, mine] = qkv[:, mine]
        out, gradient = with_gradient(packed, wild, upstream)
        alone, its_gradient = with_gradient(dense, qkv[:, mine], upstream[:, mine])
        torch.testing.assert_close(out[:, mine], alone)
        torch.testing.assert_close(gradient[:, mine], its_gradient)
        assert out.isnan().sum() == out[0, 0].numel() * (sum(lengths) - length)  # the others are NaN indeed


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_an_upstream_gradient_of_one_text_reaches_no_other(backend: str) -> None:
    qkv, upstream = inputs(1, 9, 2, 8, dtype=torch.float32)
    upstream[:, :5] = 0
    packing = Packing.from_lengths((5, 4))
    _, gradient = with_gradient(lambda x: attention(x, packing=packing, backend=backend), qkv, upstream)
    assert not gradient[:, :5].any() and gradient[:, 5:].all()


def test_a_causal_row_is_the_last_row_of_a_shorter_sequence() -> None:
    qkv, _ = inputs(2, 6, 2, 8, dtype=torch.float32)
    out = attention(qkv, causal=True)
    for length in range(1, 7):
        short = attention(qkv[:, :length].contiguous())
        torch.testing.assert_close(out[:, length - 1], short[:, -1])


def test_flex_without_a_gradient_matches_the_definition() -> None:
    for lengths in (None, (3, 6, 1)):
        for causal in (False, True):
            qkv, _ = inputs(1, 10, 2, 16, dtype=torch.float32)
            given: dict[str, Any] = {
                "packing": Packing.from_lengths(lengths) if lengths else None,
                "causal": causal,
            }
            out = attention(qkv, **given, backend="flex")
            torch.testing.assert_close(out, attention(qkv, **given, backend="definition"))


def test_varlen_is_called_as_this_torch_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    windows = []
    monkeypatch.setattr(
        varlen,
        "varlen_attn",
        lambda *args, _real=varlen.varlen_attn, **kwargs: windows.append(kwargs) or _real(*args, **kwargs),
    )
    qkv = torch.empty(1, 9, 3, 2, 16, device="meta", dtype=torch.bfloat16)
    packing = Packing(offsets_B1=torch.empty(3, device="meta", dtype=torch.int32), longest=5)
    for causal in (False, True):
        out = BACKENDS["varlen"](qkv, packing, causal)
        assert out.shape == (1, 9, 2, 16) and out.dtype == qkv.dtype
    assert windows == [{"window_size": (-1, -1)}, {"window_size": (-1, 0)}]


@pytest.fixture
def xformers_that_records(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for xformers, with the names and fields of its release 0.0.35."""
    masks: list[Any] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        masks.append(attn_bias)
        return q + k + v

    def kind(name: str) -> Callable[..., SimpleNamespace]:
        return lambda **fields: SimpleNamespace(kind=name, **fields)

    names = ("LowerTriangularMask", "BlockDiagonalMask", "BlockDiagonalCausalMask", "_SeqLenInfo")
    parts = {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {"attn_bias": SimpleNamespace(**{name: kind(name) for name in names})},
    }
    for name, content in parts.items():
        part = ModuleType(name)
        part.__dict__.update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, part)
    return masks


def test_xformers_is_given_the_offsets_as_they_are(xformers_that_records: list[Any]) -> None:
    qkv = torch.randn(1, 7, 3, 2, 8)
    packing = Packing.from_lengths((3, 4))
    for given in ((None, False), (None, True), (packing, False), (packing, True)):
        assert torch.equal(BACKENDS["xformers"](qkv, *given), qkv[:, :, 0] + qkv[:, :, 1] + qkv[:, :, 2])
    dense, causal, packed, packed_causal = xformers_that_records
    assert dense is None and causal.kind == "LowerTriangularMask"
    assert (packed.kind, packed_causal.kind) == ("BlockDiagonalMask", "BlockDiagonalCausalMask")
    for mask in (packed, packed_causal):
        assert mask.q_seqinfo is mask.k_seqinfo and mask.q_seqinfo.kind == "_SeqLenInfo"
        assert mask.q_seqinfo.seqstart is packing.offsets_B1
        assert (mask.q_seqinfo.max_seqlen, mask.q_seqinfo.seqstart_py) == (4, [0, 7])


def test_without_xformers_the_error_names_it_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    qkv = torch.randn(1, 2, 3, 1, 8)
    with pytest.raises(RuntimeError, match=r"needs the package xformers.*pip install -e '\.\[gpu\]'"):
        BACKENDS["xformers"](qkv, None, False)


def test_importing_the_file_imports_no_optional_backend() -> None:
    imported = []
    real = builtins.__import__

    def watch(name: str, *args: Any) -> ModuleType:
        imported.append(name)
        return real(name, *args)

    spec = importlib.util.find_spec("mnemos.kernels.attention")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    sys.modules[fresh.__name__], before = (
        fresh,
        sys.modules[fresh.__name__],
    )  # dataclasses look themselves up there
    try:
        builtins.__import__ = watch
        spec.loader.exec_module(fresh)
    finally:
        builtins.__import__ = real
        sys.modules[fresh.__name__] = before
    assert "torch" in imported
    assert not [name for name in imported if name.startswith(("xformers", "torch.nn.attention"))]


# ---- refusals: what came, what is allowed, what to do
def test_an_input_of_another_shape_is_named() -> None:
    qkv = torch.randn(2, 3, 3, 1, 8)
    with pytest.raises(ValueError, match=r"\[2, 3, 2, 1, 8\]; it must be floating \[B, L, 3, H, W\]"):
        attention(qkv[:, :, :2].contiguous())
    with pytest.raises(ValueError, match=r"\[3, 3, 1, 8\]"):
        attention(qkv[0])
    with pytest.raises(ValueError, match=r"torch.int64 \[2, 3, 3, 1, 8\]"):
        attention(qkv.long())
    with pytest.raises(ValueError, match=r"must be contiguous; call \.contiguous\(\)"):
        attention(qkv[:, :2])


def test_a_packing_that_cannot_be_is_named() -> None:
    qkv = torch.randn(2, 3, 3, 1, 8)
    packing = Packing.from_lengths((1, 2))
    assert packing.offsets_B1.tolist() == [0, 1, 3] and packing.longest == 2
    with pytest.raises(ValueError, match=r"qkv is \[2, 3, 3, 1, 8\] on cpu.*must be \[1, T, 3, H, W\]"):
        attention(qkv, packing=packing)
    elsewhere = Packing(offsets_B1=packing.offsets_B1.to("meta"), longest=2)
    with pytest.raises(ValueError, match=r"offsets are on meta; .*one device"):
        attention(qkv[:1], packing=elsewhere)
    with pytest.raises(ValueError, match=r"longest is 9 of 3 tokens"):
        attention(qkv[:1], packing=Packing(offsets_B1=packing.offsets_B1, longest=9))
    with pytest.raises(ValueError, match=r"torch.int64 \[3\]; it must be torch.int32 \[B \+ 1\]"):
        Packing(offsets_B1=packing.offsets_B1.long(), longest=2)
    with pytest.raises(ValueError, match=r"torch.int32 \[1\].*B >= 1"):
        Packing(offsets_B1=packing.offsets_B1[:1], longest=2)
    with pytest.raises(ValueError, match=r"longest is 0; it must be"):
        Packing(offsets_B1=packing.offsets_B1, longest=0)


def test_an_unknown_backend_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fast'; .*auto, definition, sdpa, varlen, xformers, flex"):
        attention(torch.randn(1, 3, 3, 1, 8), backend="fast")


def test_a_backend_that_cannot_is_refused_and_not_replaced() -> None:
    qkv = torch.randn(1, 3, 3, 1, 8)
    with pytest.raises(ValueError, match=r"varlen takes packed batches and got none; pass packing="):
        attention(qkv, backend="varlen")
    for backend in ("varlen", "xformers"):
        with pytest.raises(
            ValueError, match=rf"{backend} has no operator for cpu tensors; use a CUDA device"
        ):
            attention(qkv, packing=Packing.from_lengths((3,)), backend=backend)
    with pytest.raises(ValueError, match=r"flex takes .* got torch.float64; ask for definition"):
        attention(qkv.double(), backend="flex")
    with pytest.raises(ValueError, match=r"flex has no gradient on cpu tensors; use torch.no_grad\(\)"):
        attention(qkv.requires_grad_(), backend="flex")


def test_a_batch_is_laid_out_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = packing_module.layout
    monkeypatch.setattr(packing_module, "layout", lambda *args: made.append(args) or real(*args))
    qkv, packing = torch.randn(1, 9, 3, 2, 8), Packing.from_lengths((4, 5))
    first = attention(qkv, packing=packing, backend="definition")
    assert torch.equal(attention(qkv, packing=packing, backend="definition"), first) and len(made) == 1
    attention(torch.randn(1, 9, 3, 4, 8), packing=packing, backend="definition")
    assert len(made) == 2, "other heads lie elsewhere"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Return a maker of tensors that call themselves CUDA tensors and hold nothing, of a GPU that can be named."""

    def make(width: int, dtype: torch.dtype, name: str = "Some GPU", capability: str = "9.0") -> Tensor:
        monkeypatch.setattr(module, "_gpu", lambda device: (name, capability))
        with FakeTensorMode():
            return torch.empty(1, 40, 3, 2, width, device="cuda", dtype=dtype)

    return make


def test_what_a_gpu_backend_cannot_take_is_named(gpu: Callable[..., Tensor]) -> None:
    packing = Packing.from_lengths((30, 10))
    half, single = torch.bfloat16, torch.float32
    for backend in ("varlen", "xformers"):
        assert refusal(backend, gpu(88, half, capability="10.0"), packing) is None
        for width in (12, 264):
            assert f"multiples of 8 up to 256 and got {width}" in str(
                refusal(backend, gpu(width, half), packing)
            )
        assert "torch.float16 and got torch.float32" in str(refusal(backend, gpu(64, single), packing))
        assert "capability 8.0 on and got 7.5" in str(
            refusal(backend, gpu(64, half, capability="7.5"), packing)
        )
    assert "16 or more on a GPU and got 8" in str(refusal("flex", gpu(8, half)))
    assert refusal("flex", gpu(16, half)) is None
    for backend in ON_A_CPU:
        assert refusal(backend, gpu(7, torch.float64), packing) is None


# ---- the table
def use_table(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, str, bool, bool, int, int, str]) -> None:
    """Put rows (device, dtype, packed, causal, width, tokens, backend) in place of the measured ones."""
    names = ("device", "dtype", "packed", "causal", "width", "tokens", "backend")
    text = json.dumps({"rows": [{**dict(zip(names, row, strict=True)), "capability": "9.0"} for row in rows]})
    monkeypatch.setattr(module, "TABLE", module._read_table(text))


def test_nearest_width_decides_then_nearest_tokens(
    monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Tensor]
) -> None:
    layout = ("Some GPU", "bfloat16", False, False)
    use_table(
        monkeypatch,
        (*layout, 64, 37, "flex"),
        (*layout, 64, 197, "xformers"),
        (*layout, 32, 40, "definition"),
        ("Some GPU", "float32", False, False, 64, 40, "sdpa"),
        ("Some GPU", "bfloat16", True, False, 64, 40, "varlen"),
        ("Some GPU", "bfloat16", False, True, 64, 40, "sdpa"),
        ("Other GPU", "bfloat16", False, False, 64, 40, "sdpa"),
    )
    q = gpu(64, torch.bfloat16)  # 40 tokens
    assert choose_backend(q) == "flex"
    assert choose_backend(gpu(80, torch.bfloat16)) == "flex"  # nearest to 64
    assert choose_backend(gpu(40, torch.bfloat16)) == "definition"  # nearest to 32
    assert choose_backend(gpu(64, torch.float32)) == "sdpa"
    assert choose_backend(q, Packing.from_lengths((40,))) == "varlen"
    assert choose_backend(q, causal=True) == "sdpa"
    with FakeTensorMode():
        assert (
            choose_backend(torch.empty(1, 150, 3, 2, 64, device="cuda", dtype=torch.bfloat16)) == "xformers"
        )


def test_a_packed_batch_is_looked_up_by_its_longest_text(
    monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Tensor]
) -> None:
    layout = ("Some GPU", "bfloat16", True, False, 64)
    use_table(monkeypatch, (*layout, 10, "varlen"), (*layout, 40, "xformers"))
    q = gpu(64, torch.bfloat16)  # 40 tokens in all
    assert choose_backend(q, Packing.from_lengths((12, 12, 12, 4))) == "varlen"
    assert choose_backend(q, Packing.from_lengths((38, 2))) == "xformers"


def test_a_gpu_is_looked_up_by_name_then_by_capability(
    monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Tensor]
) -> None:
    use_table(monkeypatch, ("Some GPU", "bfloat16", False, False, 64, 40, "flex"))
    assert choose_backend(gpu(64, torch.bfloat16)) == "flex"
    assert choose_backend(gpu(64, torch.bfloat16, name="Its sister")) == "flex"  # 9.0, too
    assert choose_backend(gpu(64, torch.bfloat16, name="A stranger", capability="8.0")) == "sdpa"


def test_a_row_whose_backend_cannot_take_the_call_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Tensor]
) -> None:
    layout = ("Some GPU", "bfloat16", False, False)
    use_table(monkeypatch, (*layout, 64, 40, "xformers"), (*layout, 64, 197, "flex"))
    assert choose_backend(gpu(64, torch.bfloat16)) == "xformers"
    assert choose_backend(gpu(60, torch.bfloat16)) == "flex"  # 60 is no multiple of 8


def test_without_a_row_the_stated_default_is_taken(
    monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Tensor]
) -> None:
    use_table(monkeypatch)
    packing = Packing.from_lengths((40,))
    assert choose_backend(gpu(64, torch.bfloat16)) == "sdpa"
    assert choose_backend(gpu(64, torch.bfloat16), packing) == "varlen"
    assert choose_backend(gpu(64, torch.float16), packing) == "varlen"
    assert choose_backend(gpu(64, torch.float32), packing) == "sdpa"
    assert choose_backend(gpu(64, torch.bfloat16, capability="7.5"), packing) == "sdpa"
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_backend(torch.zeros(1, 40, 3, 2, 64, dtype=dtype)) == "definition"
        assert choose_backend(torch.zeros(1, 40, 3, 2, 64, dtype=dtype), packing) == "definition"


def test_auto_runs_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 5, 3, 1, 8)
    for backend in ON_A_CPU:
        use_table(monkeypatch, ("cpu", "float32", False, False, 8, 5, backend))
        ran = []
        monkeypatch.setitem(module.BACKENDS, backend, lambda *args, ran=ran: ran.append(args) or args[0])
        attention(qkv)
        assert len(ran) == 1


def test_the_stored_table_is_whole() -> None:
    rows = json.loads(TABLE_PATH.read_text())["rows"]
    keys = [
        tuple(row[name] for name in ("device", "dtype", "packed", "causal", "tokens", "width"))
        for row in rows
    ]
    assert len(keys) == len(set(keys))
    for row in rows:
        assert row["backend"] in row["us"] and set(row["us"]) <= set(BACKENDS)
        assert row["us"][row["backend"]] <= 1.06 * min(row["us"].values())  # 1.05 of the bench, and rounding
        assert row["torch"] and ("capability" in row or (row["device"] == "cpu" and row["threads"]))
    seen = {
        tuple(row[name] for name in ("dtype", "packed", "causal")) for row in rows if row["device"] == "cpu"
    }
    assert {(dtype, packed, False) for dtype in ("float32", "bfloat16") for packed in (False, True)} <= seen


@pytest.mark.parametrize(
    ("lengths", "dynamic"),
    [
        pytest.param(None, None, id="dense"),
        pytest.param(None, True, id="dense-of-any-size"),
        pytest.param((3, 6, 1), True, id="packed-of-any-size"),
    ],
)
def test_compiles_whole(lengths: Sequence[int] | None, dynamic: bool | None) -> None:
    torch.compiler.reset()
    packing = Packing.from_lengths(lengths) if lengths else None

    def block(qkv: Tensor) -> Tensor:
        return attention(qkv, packing=packing).sin()

    # "aot_eager" traces forward and backward and compiles no C++
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (10,) if lengths else (10, 17):
        qkv, upstream = inputs(1, tokens, 2, 16, dtype=torch.float32)
        for ours, plain in zip(
            with_gradient(compiled, qkv, upstream), with_gradient(block, qkv, upstream), strict=True
        ):
            torch.testing.assert_close(ours, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_every_backend_on_a_gpu(backend: str, dtype: torch.dtype, causal: bool) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers", reason="needs xformers: pip install -e '.[gpu]'")
    drawn = torch.randint(20, 113, (7,), generator=torch.Generator().manual_seed(0)).tolist()
    ran = 0
    for tokens, heads, width in (
        (37, 12, 64),
        (50, 16, 80),
        (50, 16, 88),
        (197, 12, 64),
        (145, 16, 32),
        (197, 16, 32),
    ):
        for lengths in (None, (112, *drawn)):
            B, L = (1, sum(lengths)) if lengths else (2, tokens)
            qkv, upstream = (x.cuda() for x in inputs(B, L, heads, width, dtype=dtype))
            packing = Packing.from_lengths(lengths, "cuda") if lengths else None
            if backend == "auto" or refusal(backend, qkv[:, :, 0], packing) is None:
                torch.compiler.reset()  # flex compiles for every shape
                compare(qkv, upstream, lengths, causal, backend)
                ran += 1
    if not ran:  # the refusals say so: half precision only
        assert dtype == torch.float32 and backend in ("varlen", "xformers")
