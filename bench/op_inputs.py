"""What the operations are called with in training: random arguments in the shapes the presets run on one GPU.

Every function here returns a `Make`: (device, samples, dtype) to the arguments by name, in the order of the
reference's parameters. On the device "meta" they have shapes and no values.

Shape suffixes: B = samples, K = rows chosen.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from mnemos.engine.settings import resolve
from mnemos.sharding.modalities import STORED_SIZES

Arguments = dict[str, Any]
Make = Callable[[torch.device, int, torch.dtype], Arguments]
Shape = tuple[int, int, int]

PRESETS = ("base", "large", "huge", "giant")  # they differ in the encoder alone
WIDTHS = {preset: resolve(preset, {}).model.width for preset in PRESETS}
BASE, STORED = resolve("base", {}), STORED_SIZES["base"]
EDGES: dict[str, tuple[int, ...]] = {"image": STORED.image, "volume": STORED.volume}
PATCH = {"image": (BASE.model.image_patch,) * 2, "volume": (BASE.model.volume_patch,) * 3}
NUM_PATCHES = {kind: prod(EDGES[kind]) // prod(PATCH[kind]) for kind in PATCH}
NUM_VISIBLE = {kind: int((1 - BASE.training.mask_ratio) * number) for kind, number in NUM_PATCHES.items()}
NUM_MASKED = {kind: number - NUM_VISIBLE[kind] for kind, number in NUM_PATCHES.items()}
RAW = {  # name: kind, stored channels, stored type, channels of a patch
    "rgb": ("image", 3, torch.uint8, 3),
    "grey": ("image", 1, torch.uint8, 3),
    "volume": ("volume", 1, torch.int16, 1),
}
TOKENS_PER_TEXT, SHORT = 75, 13  # packed tokens of a batch: no round number, as in training
SCORED_PER_TEXT = 16


def encoder(what: str, preset: str, samples: int) -> Shape:
    """Return the shape of the encoder's stream; texts are packed, without padding."""
    if what == "text":
        return 1, TOKENS_PER_TEXT * samples - SHORT, WIDTHS[preset]
    return samples, 1 + NUM_VISIBLE[what], WIDTHS[preset]


def decoder(kind: str, samples: int) -> Shape:
    """Return the shape of the image decoder's stream."""
    return samples, 1 + NUM_PATCHES[kind], BASE.model.decoder_width


def residual(shape: Callable[[int], Shape], *, scaled: bool, drop: bool) -> Make:
    """Arguments of `layer_scale_residual_norm`."""
    rate = BASE.model.drop_path

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        runs, tokens, width = shape(samples)
        normal = partial(torch.randn, device=device, dtype=dtype)
        chance = torch.rand(tokens if runs == 1 else runs, device=device)
        return {
            "x": normal(runs, tokens, width),
            "branch": normal(runs, tokens, width),
            "scale": normal(width) if scaled else None,
            "keep": (chance >= rate) / (1 - rate) if drop else None,
            "weight": normal(width),
            "bias": normal(width),
            "eps": 1e-5,
        }

    return make


def masks(kind: str) -> Make:
    """Arguments of `random_patch_ids`, the key left out."""

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        place_B = torch.arange(samples, device=device)
        return {"place": place_B, "num_patches": NUM_PATCHES[kind], "num_visible": NUM_VISIBLE[kind]}

    return make


def visible_patches(what: str, *, mixed: bool) -> Make:
    """Arguments of `gather_patches`; mixed: with flips, partners and weights."""
    kind, _, _, channels = RAW[what]

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        uniform = partial(torch.rand, device=device)
        return {
            "images": _images(device, samples, what),
            "ids": _ids(device, samples, NUM_PATCHES[kind], NUM_VISIBLE[kind]),
            "patch": PATCH[kind],
            "channels": channels,
            "scale": uniform(samples) + 0.5,
            "shift": uniform(samples),
            "flip": uniform(samples, len(PATCH[kind])) < 0.5 if mixed else None,
            "partner": torch.arange(samples, device=device).flip(0) if mixed else None,
            "weight": uniform(samples) if mixed else None,
            "dtype": dtype,
        }

    return make


def masked_patches(what: str, *, flip: bool) -> Make:
    """Arguments of `masked_patch_mse`, the shift left out."""
    kind, _, _, channels = RAW[what]
    num, values = NUM_MASKED[kind], prod(PATCH[kind]) * channels

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        return {
            "pred": torch.randn(samples, num, values, device=device, dtype=dtype),
            "images": _images(device, samples, what),
            "ids": _ids(device, samples, NUM_PATCHES[kind], num),
            "patch": PATCH[kind],
            "channels": channels,
            "scale": torch.rand(samples, device=device) + 0.5,
            "flip": torch.rand(samples, len(PATCH[kind]), device=device) < 0.5 if flip else None,
            "factor": torch.full((), 1 / (samples * num), device=device),
        }

    return make


def masked_rows(kind: str) -> Make:
    """Arguments of `gather_tokens` behind the image decoder."""

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        x_BLD = torch.randn(decoder(kind, samples), device=device, dtype=dtype)
        return {"x": x_BLD, "ids": _ids(device, samples, NUM_PATCHES[kind], NUM_MASKED[kind]) + 1}

    return make


def scored_rows(preset: str) -> Make:
    """Arguments of `gather_tokens` before the word head."""

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        runs, tokens, width = encoder("text", preset, samples)
        x_BLD = torch.randn(runs, tokens, width, device=device, dtype=dtype)
        return {"x": x_BLD, "ids": _ids(device, runs, tokens, SCORED_PER_TEXT * samples)}

    return make


def decoder_places(kind: str, parts: int) -> Make:
    """Arguments of `place_tokens`: rows of the decoder's stream, or of its queries, keys and values with 3 parts."""

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        width = parts * BASE.model.decoder_width
        normal = partial(torch.randn, device=device, dtype=dtype)
        return {
            "tokens": normal(samples, 1 + NUM_VISIBLE[kind], width),
            "table": normal(NUM_PATCHES[kind], width),
            "visible": _ids(device, samples, NUM_PATCHES[kind], NUM_VISIBLE[kind]),
        }

    return make


def features(what: str, preset: str) -> Make:
    """Arguments of `feature_mse`."""

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        shape = encoder(what, preset, samples)
        normal = partial(torch.randn, shape, device=device, dtype=dtype)
        factor = torch.full((), 1 / prod(shape[:-1]), device=device)
        return {"student": normal(), "teacher": normal(), "factor": factor}

    return make


def words(vocab: int) -> Make:
    """Arguments of `masked_lm_loss`."""

    def make(device: torch.device, samples: int, dtype: torch.dtype) -> Arguments:
        num, width = SCORED_PER_TEXT * samples, WIDTHS["base"]
        labels = torch.randint(0, vocab, (num,), device=device)
        return {
            "hidden": torch.randn(num, width, device=device, dtype=dtype),
            "weight": torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5,
            "bias": torch.zeros(vocab, device=device, dtype=dtype),
            "labels": torch.where(torch.rand(num, device=device) < 0.1, -100, labels),
            "factor": torch.full((), 1 / num, device=device),
        }

    return make


def _ids(device: torch.device, rows: int, num: int, chosen: int) -> Tensor:
    """Return int64 [rows, chosen]: unique, ascending along a row, below `num`."""
    return torch.rand(rows, num, device=device).argsort(1)[:, :chosen].sort(1).values


def _images(device: torch.device, samples: int, what: str) -> Tensor:
    kind, stored, dtype, _ = RAW[what]
    low, high = (0, 256) if dtype == torch.uint8 else (-1024, 1025)
    return torch.randint(low, high, (samples, stored, *EDGES[kind]), device=device, dtype=dtype)
