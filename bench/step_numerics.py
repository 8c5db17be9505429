"""Is a bf16 loss curve within the noise of fp32? The same batches in both, and fp32 with other seeds beside."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mnemos.bench.step_inputs import Data, make_training, only
from mnemos.bench.step_rows import release
from mnemos.engine.slots import learning_rate
from mnemos.sharding.errors import UserError

SEEDS = (0, 1, 2)  # the first is that of the pair compared; the others say what noise is
WARMUP = 0.1
SMOOTHED = 10  # updates of a running mean: single batches differ by more than any rounding
PEAK_RATE = 1e-3


def loss_curve(
    data: Data, kind: str, *, precision: str, seed: int, steps: int, advance: Callable[[], Any]
) -> NDArray[np.float64]:
    """Return the losses of the first `steps` pretext updates of a fresh stage."""
    peak = PEAK_RATE * 256 / data.batch  # as a setting: for 256 samples
    more = [f"training.seed={seed}", f"training.base_lr={peak}", f"training.warmup={WARMUP}"]
    training = make_training(data, kind, vocab=None, precision=precision, more=more)
    training.schedule = only(training, "pretext", steps)  # type: ignore[assignment]
    losses: list[torch.Tensor] = []
    for number, raw in enumerate(training.batches(0)):
        training.engine.optimizer.set_rate(learning_rate(number, steps, PEAK_RATE, WARMUP))
        losses.append(training.train_step(raw).detach().clone())
        advance()
    curve = torch.stack(losses).double().cpu().numpy()
    release(training)
    if len(curve) != steps:
        raise UserError(f"{steps} updates are asked for, a schedule has {len(curve)}; ask for fewer")
    return np.asarray(curve)


def smoothed(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the running mean over `SMOOTHED` updates, or over all where there are fewer."""
    width = min(SMOOTHED, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the root mean square of the difference of two smoothed curves."""
    return math.sqrt(float(np.mean((smoothed(one) - smoothed(other)) ** 2)))


def compare(bf16: NDArray[np.float64], fp32: Sequence[NDArray[np.float64]]) -> dict[str, float | bool]:
    """Return how far bf16 lies from fp32 on the same batches, how far fp32 from itself with other seeds, and the verdict."""
    pairs = [(one, other) for place, one in enumerate(fp32) for other in fp32[place + 1 :]]
    noise = min(distance(one, other) for one, other in pairs)
    apart = distance(bf16, fp32[0])
    return {
        "bf16_from_fp32": apart,
        "largest_difference": float(np.abs(bf16 - fp32[0]).max()),
        "fp32_seeds_apart": noise,
        "last_bf16": float(smoothed(bf16)[-1]),
        "last_fp32": float(smoothed(fp32[0])[-1]),
        "within_noise": apart <= noise,
    }


def numerics(
    data: Data, kind: str, steps: int, advance: Callable[[], Any] = lambda: None
) -> tuple[dict[str, float | bool], dict[str, list[float]]]:
    """Train in fp32 with every seed and in bf16 with the first; return the comparison and the curves."""
    fp32 = [
        loss_curve(data, kind, precision="fp32", seed=seed, steps=steps, advance=advance) for seed in SEEDS
    ]
    bf16 = loss_curve(data, kind, precision="bf16", seed=SEEDS[0], steps=steps, advance=advance)
    curves = {f"fp32 seed {seed}": curve.tolist() for seed, curve in zip(SEEDS, fp32, strict=True)}
    return compare(bf16, fp32), {**curves, f"bf16 seed {SEEDS[0]}": bf16.tolist()}
