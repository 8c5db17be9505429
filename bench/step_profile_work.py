"""The least a step must do, by role: floating-point operations, and bytes when every operand is read and written once.

FLOPs: 2 a multiply-add; a matrix product is done three times in training (forward, gradient of its input, gradient of its
weight), attention's two products twice more in backward. The decoder's exact savings are taken off (they change no
result): its first block's queries, keys and values of mask tokens depend on the place alone, its last block is asked for
masked tokens only. Bytes: as in the registry of operations, `op_cases.py`; GELU and the norms as passes of their own.

Shape suffixes of the comments: T tokens of the encoder, D its width, F its inner width, N tokens of the decoder, E its
width, M masked patches, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mnemos.engine.curriculum import Stage
from mnemos.engine.encoder import EncoderShape, patch_edges
from mnemos.engine.estimates import sizes, step_flops
from mnemos.engine.preparing import TextRows
from mnemos.engine.rehearsal.embedding_batches import PackedTexts
from mnemos.engine.settings import Settings

OPTIMIZER_BYTES = (
    28  # a parameter: gradient in, weight out, and master weight and both moments in and out (bf16 or fp32)
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a mean step computes on.

    Attributes:
        samples: of the batch.
        tokens: of the encoder, CLS included, padding not.
        pairs: of tokens that see each other in the encoder.
        seen: patches the tokenizer projects; 0 for texts.
        places: patches of one sample; 0 for texts.
        scored: patches or words to predict.
        values: of one prediction; patch_values: of one patch.
        raw_bytes: of the samples as stored; 0 for texts.
        crops: every sample is cropped and resized.
        estimate: FLOPs of an update by phase, by the engine's own estimate (`engine/estimates.py`).
    """

    samples: float
    tokens: float
    pairs: float
    seen: float
    places: int
    scored: float
    values: int
    patch_values: int
    raw_bytes: float
    crops: bool
    estimate: dict[str, float]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the time at these rates, the slower of both."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


Product = Callable[[float, int, int, int], Work]  # of rows, input and output width, and how often it is done


def load_of(
    stage: Stage, shape: EncoderShape, settings: Settings, batches: Sequence[Any], *, unmasked: bool = False
) -> Load:
    """Return what a mean step of these batches computes on.

    Args:
        batches: `RawBatch`, or for texts `TextRows` (training) or `PackedTexts` (embedding).
        unmasked: an embedding pass, which sees every patch.
    """
    size, kind, num = sizes(stage, shape, settings), stage.manifest.kind, len(batches)
    phases = ("pretext", "rehearsal")
    if kind == "text":
        lengths = [length for batch in batches for length in _lengths(batch)]
        samples = len(lengths) / num
        scored = [batch.scored_S for batch in batches if isinstance(batch, TextRows)]
        return Load(
            samples=samples,
            tokens=sum(lengths) / num,
            pairs=sum(length**2 for length in lengths) / num,
            seen=0,
            places=0,
            scored=sum(0 if one is None else len(one) for one in scored) / num,
            values=shape.vocab,
            patch_values=0,
            raw_bytes=0,
            crops=False,
            estimate={phase: samples * step_flops(size, settings, phase) for phase in phases},
        )
    samples = sum(len(batch.data) for batch in batches) / num
    edges, channels = patch_edges(shape, kind)
    places = size.decoder - 1
    tokens = size.decoder if unmasked else size.encoder
    return Load(
        samples=samples,
        tokens=samples * tokens,
        pairs=samples * tokens**2,
        seen=samples * (tokens - 1),
        places=places,
        scored=samples * size.predicted,
        values=size.values,
        patch_values=math.prod(edges) * channels,
        raw_bytes=sum(batch.data.numel() * batch.data.element_size() for batch in batches) / num,
        crops=stage.manifest.augment == "crop",
        estimate={phase: samples * step_flops(size, settings, phase) for phase in phases},
    )


def _lengths(batch: TextRows | PackedTexts) -> list[int]:
    """Return the tokens of every text; what fills up a packed row is none."""
    if isinstance(batch, TextRows):
        return [end - begin for begin, end in pairwise(batch.bounds)]
    rows = zip(batch.offsets, batch.texts, strict=True)
    return [length for offsets, texts in rows for length in offsets.diff()[:texts].tolist()]


def work_by_role(
    load: Load, settings: Settings, phase: str, *, bf16: bool, parameters: int
) -> dict[str, Work]:
    """Return the least work of a step by role; roles that are not named need none.

    Args:
        load: what the step computes on.
        settings: of the run.
        phase: pretext, rehearsal or embedding.
        bf16: computed in bf16, else in fp32.
        parameters: values the optimiser moves.
    """
    model, e = settings.model, 2 if bf16 else 4
    trains, teaches = phase != "embedding", phase == "rehearsal"
    T, D, F, depth = load.tokens, model.width, model.ffn, model.depth
    passes, extra = (3 if trains else 1), int(teaches)

    def product(rows: float, into: int, out: int, times: int) -> Work:
        """One matrix product, its input, output and weight moved each time it is done."""
        return Work(2 * rows * into * out, e * (rows * (into + out) + into * out)) * times

    def block(rows: float, width: int, inner: int, times: int) -> Work:
        shapes = ((width, 3 * width), (width, width), (width, inner), (inner, width))
        return sum((product(rows, *one, times) for one in shapes), Work())

    seen = load.seen
    work = {
        "products: tokenizer": product(seen, load.patch_values, D, 2 if trains else 1),  # pixels take no gradient
        "products: encoder": block(T, D, F, passes) * depth,
        "attention": Work(4 * load.pairs * D * (passes + extra), e * T * D * (12 if trains else 4)) * depth,
        # forward: stream and branch in, stream and normed out; backward six streams, among them the branch for its scale
        "norms, residuals": Work(0, e * T * D * 2 * depth * ((10 if trains else 4) + 4 * extra)),
        "GELU": Work(0, e * T * F * depth * ((5 if trains else 2) + 2 * extra)),
        "placing tokens": Work(0, e * D * (seen + T) * ((2 if trains else 1) + extra)),
        "optimiser": Work(0, OPTIMIZER_BYTES * parameters),
    }  # fmt: skip
    if teaches:
        work["products: teacher"] = block(T, D, F, 1) * depth + product(seen, load.patch_values, D, 1)
        work["losses"] = Work(0, 3 * e * T * D)
    if load.places:
        shown = load.raw_bytes * seen / (load.samples * load.places)
        cropped = 2 * load.raw_bytes if phase == "pretext" and load.crops else 0
        work["augmentation, pixels"] = Work(0, cropped + shown * (1 + extra) + e * seen * load.patch_values)
    if phase == "pretext":
        for role, more in (_decoder if load.places else _words)(load, settings, e, product).items():
            work[role] = work.get(role, Work()) + more
    return {role: one for role, one in work.items() if one != Work()}


def _words(load: Load, settings: Settings, e: int, product: Product) -> dict[str, Work]:
    """What the word head adds: transform and vocabulary of the scored words; the logits read and their gradient written."""
    rows, D = load.scored, settings.model.width
    return {
        "products: head": product(rows, D, D, 3) + product(rows, D, load.values, 3),
        "GELU": Work(0, 5 * e * rows * D),
        "norms, residuals": Work(0, 6 * e * rows * D),
        "losses": Work(0, 2 * e * rows * load.values),
        "placing tokens": Work(0, 4 * e * rows * D),
    }


def _decoder(load: Load, settings: Settings, e: int, product: Product) -> dict[str, Work]:
    """What the image decoder adds, its exact savings taken off."""
    model, B = settings.model, load.samples
    E, depth, M, places = model.decoder_width, model.decoder_depth, load.scored, load.places
    N = B * (1 + places)
    shown = N - M  # visible patches and CLS
    products, pairs = product(load.tokens, model.width, E, 3), 0.0
    for number in range(depth):
        keys = shown + places if number == 0 else N  # rows that are normalised and projected
        asked = M if number == depth - 1 else N  # rows whose output anybody wants
        products += product(keys, E, 2 * E, 3) + product(min(keys, asked), E, E, 3) + product(asked, E, E, 3)
        products += product(asked, E, 4 * E, 3) + product(asked, 4 * E, E, 3)
        pairs += asked * (1 + places)
    stored = load.raw_bytes * M / (B * places)  # of the patches to predict
    return {
        "products: decoder": products,
        "products: head": product(M, E, load.values, 3),
        "attention": Work(12 * pairs * E, 12 * e * N * E * depth),
        "norms, residuals": Work(0, 8 * e * E * (N * (2 * depth - 1) + 2 * M)),
        "GELU": Work(0, 5 * e * 4 * E * (N * (depth - 1) + M)),
        "losses": Work(0, 2 * e * M * load.values + stored),
        "placing tokens": Work(0, 2 * e * E * (load.tokens + N)),
    }
