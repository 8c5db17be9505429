"""What a step's rate is held against: useful FLOPs, what this machine's matrix products reach, published rates.

Published rates: the MedCoSS authors' own model (yeerwen/MedCoSS at 4ddc58f, timm 0.9.16) in torch 2.13 on two cores of
an AMD Zen 5 with bf16 instructions: batch 8, ViT-B, forward and backward without optimiser (embedding: forward under
no_grad), two threads, median of four interleaved rounds. Products of the shapes below ran at 205 (fp32) and 920 (bf16)
GFLOP/s there. Rates on a GPU are models of an H200 at batch 128 that nobody has measured.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mnemos.engine.encoder import EncoderShape
from mnemos.engine.preparing import Rows, TextRows
from mnemos.engine.settings import ModelSettings

GEMMS = ((1576, 512, 2048), (400, 768, 3072))  # rows, depth, columns
THEIR_GEMM = {"fp32": 205e9, "bf16": 920e9}  # FLOP/s
PUBLISHED = {  # samples/s by kind, phase and precision
    ("image", "pretext"): {"fp32": 3.25, "bf16": 8.44},
    ("volume", "pretext"): {"fp32": 4.19, "bf16": 9.58},
    ("text", "pretext"): {"fp32": 2.03, "bf16": 4.94},
    ("image", "rehearsal"): {"fp32": 5.04, "bf16": 4.86},
    ("volume", "rehearsal"): {"fp32": 6.66, "bf16": 3.91},
    ("text", "rehearsal"): {"fp32": 2.37, "bf16": 2.05},
    ("image", "embedding"): {"fp32": 5.74, "bf16": 17.2},
    ("volume", "embedding"): {"fp32": 7.56, "bf16": 21.9},
    ("text", "embedding"): {"fp32": 10.3, "bf16": 31.3},
}
MODELLED = {  # samples/s of the authors' step on an H200 in eager torch 2: a cost model
    ("image", "pretext"): 4140,
    ("volume", "pretext"): 4890,
    ("text", "pretext"): 3050,
    ("image", "rehearsal"): 6940,
    ("volume", "rehearsal"): 8110,
    ("text", "rehearsal"): 3340,
    ("image", "embedding"): 8180,
    ("volume", "embedding"): 10910,
}
PUBLISHED_BATCH, PUBLISHED_THREADS, PUBLISHED_PRESET = 8, 2, "base"
LEAST_SHARE = 0.9  # of a published rate
PEAKS = {"H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, by what a device's name contains


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens of some samples: what the encoder sees, what the decoder sees, what is predicted.

    Attributes:
        tokens, pairs: of the encoder, all samples together; pairs is the sum of squared lengths.
        patches: embedded.
        values: of a patch.
        decoder_tokens, decoder_pairs: likewise, of the image decoder; 0 for texts.
        predicted: rows of the last layer, `outputs` columns each.
    """

    tokens: float
    pairs: float
    patches: float = 0
    values: int = 0
    decoder_tokens: float = 0
    decoder_pairs: float = 0
    predicted: float = 0
    outputs: int = 0


def work_of(rows: Rows, shape: EncoderShape, phase: str) -> Work:
    """Return the work of a batch; in phase embedding of its whole samples."""
    if isinstance(rows, TextRows):
        lengths = [end - begin for begin, end in zip(rows.bounds, rows.bounds[1:], strict=False)]
        scored = 0 if rows.labels_S is None or phase != "pretext" else len(rows.labels_S)
        pairs = sum(length**2 for length in lengths)
        return Work(tokens=sum(lengths), pairs=pairs, predicted=scored, outputs=shape.vocab)
    B, seen = rows.visible_BK.shape
    places = seen + rows.masked_BM.shape[1]
    seen = places if phase == "embedding" else seen
    values = shape.image_patch**2 * shape.channels if rows.kind == "image" else shape.volume_patch**3
    common = {"tokens": B * (1 + seen), "pairs": B * (1 + seen) ** 2, "patches": B * seen, "values": values}
    if phase != "pretext":
        return Work(**common)
    return Work(
        **common,
        decoder_tokens=B * (1 + places),
        decoder_pairs=B * (1 + places) ** 2,
        predicted=B * (places - seen),
        outputs=values,
    )


def useful_flops(work: Work, model: ModelSettings, phase: str) -> float:
    """Return the floating-point operations the task itself needs, 2 per multiply-add, backward twice forward.

    Visible patches are embedded, real tokens encoded, masked patches and scored words predicted; the decoder runs on
    whole sequences. Nothing recomputed or thrown away counts, and what the decoder need not compute in its first and
    last block still does.
    """
    D, E = model.width, model.decoder_width
    forward = model.depth * _block(work.tokens, work.pairs, D, model.ffn) + 2 * work.patches * work.values * D
    if phase == "embedding":
        return forward
    if phase == "rehearsal":
        return 4 * forward  # the student's forward and backward, the teacher's forward
    if work.decoder_tokens:
        forward += model.decoder_depth * _block(work.decoder_tokens, work.decoder_pairs, E, 4 * E)
        forward += 2 * work.tokens * D * E + 2 * work.predicted * E * work.outputs
    else:
        forward += 2 * work.predicted * D * (D + work.outputs)
    return 3 * forward


def _block(tokens: float, pairs: float, width: int, ffn: int) -> float:
    return tokens * (8 * width**2 + 4 * width * ffn) + 4 * pairs * width


def gemm_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Return the FLOP/s of torch's F.linear over `GEMMS`: all their operations over the sum of their median times."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    operations = spent = 0.0
    for rows, depth, columns in GEMMS:
        x = torch.randn(rows, depth, device=device, dtype=dtype)
        weight, bias = (torch.randn(columns, *more, device=device, dtype=dtype) for more in ((depth,), ()))
        times: list[float] = []
        F.linear(x, weight, bias)
        begun = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begun < seconds / len(GEMMS):
            wait(device)
            start = time.perf_counter()
            F.linear(x, weight, bias)
            wait(device)
            times.append(time.perf_counter() - start)
        operations += 2.0 * rows * depth * columns
        spent += statistics.median(times)
    return operations / spent


def published_rate(kind: str, phase: str, precision: str) -> float:
    """Return the published samples/s of the authors' own model."""
    return PUBLISHED[kind, phase][precision]


def has_published_rate(preset: str, batch: int, device: torch.device) -> bool:
    """Tell whether what is measured is what rates were published of."""
    same = preset == PUBLISHED_PRESET and batch == PUBLISHED_BATCH
    return same and device.type == "cpu" and torch.get_num_threads() == PUBLISHED_THREADS


def share_of_published(
    compute: Callable[[], None],
    samples: int,
    published: float,
    precision: str,
    device: torch.device,
    rounds: int = 3,
) -> tuple[float, float, float]:
    """Return samples/s of the reference, the scale of this machine, and the share reached of the scaled rate.

    Products and steps take turns, so that what else the machine does meets both; all three are medians over the rounds,
    the share that of the rounds' own.
    """
    found: list[tuple[float, float, float]] = []
    compute()
    for _ in range(rounds):
        scale = gemm_rate(device, precision) / THEIR_GEMM[precision]
        wait(device)
        start = time.perf_counter()
        compute()
        wait(device)
        rate = samples / (time.perf_counter() - start)
        found.append((rate, scale, rate / (published * scale)))
    rate, scale, share = (statistics.median(column) for column in zip(*found, strict=True))
    return rate, scale, share


def peak_rate(device: torch.device, precision: str, calibrated: float) -> tuple[float | None, str]:
    """Return the FLOP/s that MFU is a share of, and what they are; None for an unknown GPU."""
    if device.type == "cpu":
        return calibrated, f"what F.linear reaches here in {precision}"
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    return peak, f"dense bf16 of {name}" if peak else f"unknown for {name}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 25th percentile, the median and the 75th."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def wait(device: torch.device) -> None:
    """Wait for the device where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
