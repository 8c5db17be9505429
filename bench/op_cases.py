"""The registry of operations: what each is held against, what it must move, how its device code is launched.

`aot.py` compiles the launches, `ops.py` times the public functions. A new operation is one more entry of `OPS`, with its
arguments in `op_inputs.py`; those of k-means stand in `cluster_cases.py`.

Shape suffixes: B = samples, K = rows chosen, L = tokens, D = width, R = rows.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mnemos.bench import op_inputs as inputs
from mnemos.bench.cluster_cases import CLUSTER_OPS
from mnemos.bench.op_entry import Launch, Op, size
from mnemos.bench.op_inputs import PATCH, PRESETS, RAW, Arguments, Make
from mnemos.kernels._common.loss_gradient import launch_scale_gradient
from mnemos.kernels.counter_rng import stream_key
from mnemos.kernels.feature_mse import feature_mse, feature_mse_reference, launch_feature_mse
from mnemos.kernels.gather_patches import gather_patches, gather_patches_reference, launch_gather_patches
from mnemos.kernels.gather_tokens import (
    gather_tokens,
    gather_tokens_reference,
    launch_gather_tokens,
    launch_gather_tokens_backward,
)
from mnemos.kernels.layer_scale_residual_norm import (
    launch_layer_scale_residual_norm,
    launch_layer_scale_residual_norm_backward,
    layer_scale_residual_norm,
    layer_scale_residual_norm_reference,
)
from mnemos.kernels.masked_lm_loss import (
    CHUNK_LOGITS,
    launch_softmax_gradient,
    masked_lm_loss,
    masked_lm_loss_reference,
)
from mnemos.kernels.masked_patch_mse import (
    launch_masked_patch_mse,
    masked_patch_mse,
    masked_patch_mse_reference,
)
from mnemos.kernels.place_tokens import (
    launch_place_tokens,
    launch_place_tokens_backward,
    place_tokens,
    place_tokens_reference,
)
from mnemos.kernels.random_patch_ids import (
    launch_random_patch_ids,
    random_patch_ids,
    random_patch_ids_reference,
)

BATCH = 128  # samples of one GPU
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARIES = (49_411, 1_500)  # the authors', and one trained on few texts
KEY = stream_key(0, "bench")


# ---- layer_scale_residual_norm
def norm_cases() -> Iterator[tuple[str, Make]]:
    shapes = [("base", "image"), ("base", "volume"), ("base", "text")]
    for preset, what in shapes + [(preset, "image") for preset in PRESETS[1:]]:
        shape = partial(inputs.encoder, what, preset)
        yield f"{preset} encoder {what} drop", inputs.residual(shape, scaled=True, drop=True)
    shape = partial(inputs.encoder, "image", "base")
    yield "base encoder image", inputs.residual(shape, scaled=True, drop=False)
    for kind in PATCH:
        shape = partial(inputs.decoder, kind)
        yield f"base decoder {kind}", inputs.residual(shape, scaled=False, drop=False)


def norm_forward_bytes(a: Arguments) -> int:
    return 4 * size(a["x"]) + size(a["scale"], a["keep"], a["weight"], a["bias"])


def norm_backward_bytes(a: Arguments) -> int:
    """Read both gradients and x_new, write x's; read the branch for scale's; write its own where that is not x's."""
    streams = 4 + (a["scale"] is not None) + (a["scale"] is not None or a["keep"] is not None)
    return streams * size(a["x"]) + 2 * size(a["scale"], a["weight"]) + size(a["bias"], a["keep"])


def norm_launches(a: Arguments) -> Iterator[Launch]:
    yield "forward", partial(launch_layer_scale_residual_norm, *a.values())
    x, mean_R = a["x"], torch.empty(a["x"].shape[:-1].numel(), device=a["x"].device)
    saved = (x, a["branch"], a["scale"], a["keep"], a["weight"], mean_R, mean_R)
    yield "backward", partial(launch_layer_scale_residual_norm_backward, x, x, *saved)
    yield "backward, norm only", partial(launch_layer_scale_residual_norm_backward, None, x, *saved)


# ---- gather_patches, masked_patch_mse
def gather(
    images: Tensor,
    ids: Tensor,
    patch: tuple[int, ...],
    channels: int,
    scale: Tensor,
    shift: Tensor,
    flip: Tensor | None,
    partner: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`gather_patches`, all arguments by place."""
    mixture: Arguments = {"flip_BA": flip, "partner_B": partner, "weight_B": weight}
    values: Arguments = {"scale_B": scale, "shift_B": shift, "dtype": dtype}
    return gather_patches(images, ids, patch=patch, channels=channels, **values, **mixture)


def stored_bytes(a: Arguments) -> int:
    """Bytes of the patches asked for, as stored."""
    return int(a["ids"].numel()) * prod(a["patch"]) * a["images"].shape[1] * a["images"].element_size()


def gather_bytes(a: Arguments) -> int:
    written = a["ids"].numel() * prod(a["patch"]) * a["channels"] * a["dtype"].itemsize
    per_sample = (a[name] for name in ("scale", "shift", "flip", "partner", "weight"))
    sources = 1 if a["partner"] is None else 2
    return sources * stored_bytes(a) + written + size(a["ids"], *per_sample)


def patch_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: tuple[int, ...],
    channels: int,
    scale: Tensor,
    flip: Tensor | None,
    factor: Tensor,
) -> Tensor:
    """`masked_patch_mse`, all arguments by place; its shift changes nothing."""
    values: Arguments = {"scale_B": scale, "shift_B": scale, "flip_BA": flip, "factor": factor}
    return masked_patch_mse(pred, images, ids, patch=patch, channels=channels, **values)


def patch_loss_bytes(a: Arguments) -> int:
    return size(a["pred"], a["ids"], a["scale"], a["flip"]) + stored_bytes(a)


def loss_launches(launch: Callable[..., Any]) -> Callable[[Arguments], Iterator[Launch]]:
    """Return the launches of a loss whose first argument takes a gradient, formed in forward."""

    def launches(a: Arguments) -> Iterator[Launch]:
        yield "loss", partial(launch, *a.values(), False)
        yield "loss and gradient", partial(launch, *a.values(), True)
        yield "gradient scaled", partial(launch_scale_gradient, next(iter(a.values())), a["factor"])

    return launches


# ---- gather_tokens
def chosen_bytes(a: Arguments) -> int:
    """Bytes of the rows chosen."""
    return int(a["ids"].numel()) * a["x"].shape[-1] * a["x"].element_size()


def rows_launches(a: Arguments) -> Iterator[Launch]:
    yield "forward", partial(launch_gather_tokens, a["x"], a["ids"])
    grad_BKD = a["x"].new_empty(*a["ids"].shape, a["x"].shape[-1])
    yield "backward", partial(launch_gather_tokens_backward, grad_BKD, a["ids"], a["x"].shape[1])


# ---- place_tokens
def placed_bytes(a: Arguments) -> int:
    """Bytes of the sequences the decoder sees: of every sample its prefix and all places."""
    (B, tokens, D), (L, K) = a["tokens"].shape, (len(a["table"]), a["visible"].shape[1])
    return int(B * (tokens - K + L) * D) * a["tokens"].element_size()


def place_launches(a: Arguments) -> Iterator[Launch]:
    yield "forward", partial(launch_place_tokens, *(*a.values(), 1))
    grad_BSD = a["tokens"].new_empty(len(a["tokens"]), 1 + len(a["table"]), a["tokens"].shape[2])
    for with_table, suffix in ((True, ""), (False, ", tokens only")):
        launch = launch_place_tokens_backward
        yield f"backward{suffix}", partial(launch, grad_BSD, a["visible"], 1, with_table)


# ---- masked_lm_loss
def words_flop(a: Arguments) -> int:
    """Operations of hidden x weight."""
    return 2 * int(a["hidden"].numel()) * len(a["weight"])


def words_launches(a: Arguments) -> Iterator[Launch]:
    vocab = len(a["weight"])
    rows = min(len(a["hidden"]), 4 * CHUNK_LOGITS // vocab)
    logits = a["hidden"].new_empty(rows, triton.cdiv(vocab, 16) * 16)[:, :vocab]
    for with_grad, what in ((False, "loss"), (True, "loss and gradient")):
        yield what, partial(launch_softmax_gradient, logits, a["labels"][:rows], a["factor"], with_grad)


def torch_head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    """Torch's own vocabulary head and cross-entropy in one; newer releases have it."""
    fused: Callable[..., Tensor] = F.linear_cross_entropy
    return fused(hidden, weight, labels, linear_bias=bias, reduction="sum") * factor


_ENTRIES = (
    Op(
        name="layer_scale_residual_norm",
        gate="tests/test_kernels_layer_scale_residual_norm.py",
        ours=layer_scale_residual_norm,
        reference=lambda *a: layer_scale_residual_norm_reference(*a)[:2],  # it returns its statistics too
        cases=dict(norm_cases()),
        work={"forward": norm_forward_bytes, "backward": norm_backward_bytes},
        launches=norm_launches,
        wanted=("x", "branch", "scale", "weight", "bias"),
    ),
    Op(
        name="random_patch_ids",
        gate="tests/test_kernels_random.py",
        ours=partial(random_patch_ids, key=KEY),
        reference=partial(random_patch_ids_reference, key=KEY),
        cases={f"base {kind}": inputs.masks(kind) for kind in PATCH},
        work={"forward": lambda a: (1 + a["num_patches"]) * size(a["place"])},
        launches=lambda a: iter([("forward", partial(launch_random_patch_ids, *(*a.values(), KEY)))]),
        bound="latency",
        compiles_on_cpu=False,
    ),
    Op(
        name="gather_patches",
        gate="tests/test_kernels_gather_patches.py",
        ours=gather,
        reference=gather_patches_reference,
        cases={
            f"base {what}{' flip mix' * mixed}": inputs.visible_patches(what, mixed=mixed)
            for what in RAW
            for mixed in (False, True)
        },
        work={"forward": gather_bytes},
        launches=lambda a: iter([("forward", partial(launch_gather_patches, *a.values()))]),
    ),
    Op(
        name="gather_tokens",
        gate="tests/test_kernels_gather_tokens.py",
        ours=gather_tokens,
        reference=gather_tokens_reference,
        cases={f"base decoder {kind}": inputs.masked_rows(kind) for kind in PATCH}
        | {f"{preset} encoder text": inputs.scored_rows(preset) for preset in PRESETS},
        work={
            "forward": lambda a: 2 * chosen_bytes(a) + size(a["ids"]),
            "backward": lambda a: chosen_bytes(a) + size(a["x"], a["ids"]),
        },
        launches=rows_launches,
        wanted=("x",),
    ),
    Op(
        name="masked_patch_mse",
        gate="tests/test_kernels_masked_patch_mse.py",
        ours=patch_loss,
        reference=lambda *a: masked_patch_mse_reference(*a[:-1], factor=a[-1]),
        cases={
            f"base {what}{' flip' * flip}": inputs.masked_patches(what, flip=flip)
            for what in RAW
            for flip in (False, True)
        },
        work={"forward": patch_loss_bytes, "both": lambda a: patch_loss_bytes(a) + size(a["pred"])},
        launches=loss_launches(launch_masked_patch_mse),
        wanted=("pred",),
    ),
    Op(
        name="place_tokens",
        gate="tests/test_kernels_place_tokens.py",
        ours=place_tokens,
        reference=partial(place_tokens_reference, num_prefix=1),
        cases={
            f"base decoder {kind}{what}": inputs.decoder_places(kind, parts)
            for kind in PATCH
            for what, parts in (("", 1), (" qkv", 3))
        },
        work={
            "forward": lambda a: placed_bytes(a) + size(*a.values()),
            "backward": lambda a: (
                placed_bytes(a) + size(*a.values())
            ),  # reads the first, writes two gradients
        },
        launches=place_launches,
        wanted=("tokens", "table"),
    ),
    Op(
        name="feature_mse",
        gate="tests/test_kernels_feature_mse.py",
        ours=feature_mse,
        reference=feature_mse_reference,
        cases={f"base encoder {what}": inputs.features(what, "base") for what in (*PATCH, "text")}
        | {f"{preset} encoder image": inputs.features("image", preset) for preset in PRESETS[1:]},
        work={"forward": lambda a: 2 * size(a["student"]), "both": lambda a: 3 * size(a["student"])},
        launches=loss_launches(launch_feature_mse),
        wanted=("student",),
    ),
    Op(
        name="masked_lm_loss",
        gate="tests/test_kernels_masked_lm_loss.py",
        ours=masked_lm_loss,
        reference=masked_lm_loss_reference,
        cases={f"base {vocab} words": inputs.words(vocab) for vocab in VOCABULARIES},
        work={"forward": words_flop, "both": lambda a: 3 * words_flop(a)},
        launches=words_launches,
        wanted=("hidden", "weight", "bias"),
        bound="flop",
        rival=("torch", torch_head) if hasattr(F, "linear_cross_entropy") else None,
    ),
    *CLUSTER_OPS,
)
OPS = {entry.name: entry for entry in _ENTRIES}
