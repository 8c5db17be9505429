"""Validation loss of the pretext task, beside what can be had without a model.

Images and volumes: the best constant predictor, the training set's mean target at each place. Texts: unigram and
bigram cross-entropy of the scored words.

Shape suffixes: B samples.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mnemos.engine import dist
from mnemos.engine.baselines import ConstantPredictor, NgramEntropy
from mnemos.engine.encoder import EncoderShape, patch_edges
from mnemos.engine.objectives import local_count, visible_patches
from mnemos.engine.parallel import Engine
from mnemos.engine.preparing import ImageRows, Preparer, Rows, TextRows
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import OnSkip, RawBatch, Request, read_batch

MOST_SAMPLES = 2048  # of a validation loss; more would say nothing new and cost minutes on large sets


class Validation:
    """A stage's validation samples with fixed masks.

    Args:
        held_out: the validation split; the training set's last samples stand in where it is empty.
        train: the training split, behind the baselines.
        preparer: of validation.
        shape: of the encoder.
        on_skip: told of broken samples; None refuses them.
    """

    def __init__(
        self,
        held_out: ShardSet,
        train: ShardSet,
        preparer: Preparer,
        shape: EncoderShape,
        *,
        device: torch.device,
        dtype: torch.dtype,
        on_skip: OnSkip | None = None,
    ) -> None:
        self.samples = held_out if len(held_out) else train
        self.train, self.preparer, self.shape = train, preparer, shape
        self.device, self.dtype, self.on_skip = device, dtype, on_skip
        self.batch = min(64, preparer.settings.training.batch)
        self._baselines: dict[str, float] | None = None

    def rows(self, numbers: np.ndarray) -> tuple[RawBatch, Rows]:
        """Return validation samples as stored, and ready with their masks."""
        request = Request(step=0, member=0, samples=numbers, places=numbers)
        raw = read_batch([self.samples], request, self.on_skip)
        manifest = self.samples.manifest
        if manifest.kind == "text":
            return raw, self.preparer.texts(raw, phase="pretext", training=False).to(self.device)
        raw = raw.to(self.device)
        return raw, self.preparer.images(manifest, raw, phase="pretext", training=False)

    @torch.no_grad()
    def measure(self, engine: Engine) -> dict[str, float]:
        """Return the mean loss, the baselines, and loss / baseline; collective.

        Keys: loss, samples, and constant (images, volumes) or unigram and bigram (texts), and ratio.
        """
        engine.engine.eval()
        found = torch.zeros(2, device=self.device, dtype=torch.float64)
        for rows, weight in self._batches():
            patches = None if isinstance(rows, TextRows) else visible_patches(self.shape, rows, self.dtype)
            found += weight * torch.stack([engine(rows, patches).double(), _count(rows, self.device)])
        engine.engine.train()
        loss, count = dist.total(found).tolist()
        if self._baselines is None:
            self._baselines = self._measure_baselines()
        loss /= max(1.0, count)
        lower = self._baselines.get("constant", self._baselines.get("unigram", math.nan))
        return {"loss": loss, **self._baselines, "ratio": loss / lower, "samples": float(self._num_samples)}

    @property
    def _num_samples(self) -> int:
        return min(MOST_SAMPLES, len(self.samples))

    def _batches(self) -> Iterator[tuple[Rows, float]]:
        """Yield this rank's batches; every rank gets as many, surplus ones with weight 0."""
        starts = list(range(0, self._num_samples, self.batch))
        world, rank = dist.world_size(), dist.rank()
        for turn in range(math.ceil(len(starts) / world)):
            number = turn * world + rank
            start = starts[number] if number < len(starts) else 0
            numbers = np.arange(start, min(start + self.batch, self._num_samples), dtype=np.int64)
            yield self.rows(numbers)[1], float(number < len(starts))

    def _measure_baselines(self) -> dict[str, float]:
        """Return the losses without a model, at the same masks; measured once, on rank 0."""
        measure: Callable[[], dict[str, float]] = (
            self._measure_words if self.samples.manifest.kind == "text" else self._measure_constant
        )
        return dist.on_main(measure)

    def _measure_constant(self) -> dict[str, float]:
        manifest = self.train.manifest
        edges, channels = patch_edges(self.shape, manifest.kind)
        constant = ConstantPredictor(patch=edges, channels=channels)
        for raw in self._train_batches():
            constant.add(raw.data, scale_B=raw.scale_B, shift_B=raw.shift_B)
        total, count = torch.zeros((), device=self.device), 0
        for start in range(0, self._num_samples, self.batch):
            numbers = np.arange(start, min(start + self.batch, self._num_samples), dtype=np.int64)
            raw, rows = self.rows(numbers)
            assert isinstance(rows, ImageRows)
            total += constant.score(raw.data, rows.masked_BM, scale_B=raw.scale_B, shift_B=raw.shift_B)
            count += rows.masked_BM.numel()
        return {"constant": float(total) / count}

    def _measure_words(self) -> dict[str, float]:
        assert self.train.manifest.tokenizer is not None
        entropy = NgramEntropy(self.train.manifest.tokenizer.vocab_size)
        for raw in self._train_batches():
            entropy.add(raw.data.cpu())
        score = None
        for start in range(0, self._num_samples, self.batch):
            numbers = np.arange(start, min(start + self.batch, self._num_samples), dtype=np.int64)
            raw, rows = self.rows(numbers)
            assert isinstance(rows, TextRows) and rows.scored_S is not None and rows.labels_S is not None
            text_S = np.repeat(np.arange(rows.num_samples), np.diff(rows.scored_bounds))
            position_S = rows.position_T[rows.scored_S].cpu()
            one = entropy.score(raw.data, text_S, position_S, rows.labels_S.cpu())
            score = one if score is None else score + one
        assert score is not None
        return {"unigram": score.unigram / score.count, "bigram": score.bigram / score.count}

    def _train_batches(self) -> Iterator[RawBatch]:
        most = self.preparer.settings.data.baseline_samples
        numbers = np.linspace(0, len(self.train) - 1, min(most, len(self.train))).astype(np.int64)
        for start in range(0, len(numbers), self.batch):
            part = numbers[start : start + self.batch]
            request = Request(step=0, member=0, samples=part, places=part)
            yield read_batch([self.train], request, self.on_skip).to(self.device)


def _count(rows: Rows, device: torch.device) -> Tensor:
    return torch.as_tensor(local_count(rows, "pretext"), device=device, dtype=torch.float64)
