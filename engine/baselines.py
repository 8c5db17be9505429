"""Predictors that have learned nothing but averages: the numbers a pretext loss is read against.

A masked patch can be predicted without looking, by the training set's mean target at that place; a masked
word by how often it occurs, or occurs after its left neighbour. A model that has learned must be below all of
these.

Shape suffixes: B = samples, L = patches or token positions, M = masked patches, P = values per patch,
S = scored words, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mnemos.engine.patches import all_patches, patch_statistics
from mnemos.kernels.masked_patch_mse import masked_patch_mse
from mnemos.sharding.tokenizer import PAD

UNIGRAM_PSEUDO = 0.1  # added to the count of every word of the vocabulary
BIGRAM_PSEUDO = 1.0  # observations' worth of the unigram law added to what followed each left neighbour
_ROWS = 64  # samples turned into fp32 patches at a time
_PENDING = 1 << 22  # pairs kept apart before they are counted together


class ConstantPredictor:
    """The best predictor of normalised patches that sees nothing: the mean target at each place.

    Feed it the training set, unaugmented, in batches; then score validation batches with the model's masks.
    """

    def __init__(self, *, patch: Sequence[int], channels: int) -> None:
        """Take the patch's edges, (y, x) or (z, y, x), and its channels (one stored channel is repeated)."""
        self.patch = tuple(patch)
        self.channels = channels
        self.num_samples = 0
        self._sum_LP: Tensor | None = None

    def add(self, images: Tensor, *, scale_B: Tensor, shift_B: Tensor) -> None:
        """Count a training batch in.

        Args:
            images: uint8 [B, C, Y, X] or int16 [B, 1, Z, Y, X], contiguous, on any device.
            scale_B, shift_B: fp32 [B], model value = stored * scale + shift.
        """
        parts = zip(*(torch.split(rows, _ROWS) for rows in (images, scale_B, shift_B)), strict=True)
        for part, scale, shift in parts:
            values = all_patches(part, patch=self.patch, channels=self.channels, scale_B=scale, shift_B=shift)
            mean, deviation = patch_statistics(values)
            total_LP = ((values - mean) / deviation).sum(dim=0).double()  # fp32 holds 64 terms well
            self._sum_LP = total_LP if self._sum_LP is None else self._sum_LP + total_LP
        self.num_samples += images.shape[0]

    def mean_target(self) -> Tensor:
        """Return fp32 [L, P], the constant.

        Raises:
            RuntimeError: no batch was added.
        """
        if self._sum_LP is None:
            raise RuntimeError("ConstantPredictor: no training batch was added; call add() before scoring")
        return (self._sum_LP / self.num_samples).float()

    def score(self, images: Tensor, masked_BM: Tensor, *, scale_B: Tensor, shift_B: Tensor) -> Tensor:
        """Return the fp32 sum over the B * M masked patches of mean_P (target - constant)^2, a model's loss.

        Args:
            images, scale_B, shift_B: a validation batch, as in `add`.
            masked_BM: int64 [B, M], the masked patches.
        """
        return masked_patch_mse(
            self.mean_target()[masked_BM],
            images,
            masked_BM,
            patch=self.patch,
            channels=self.channels,
            scale_B=scale_B,
            shift_B=shift_B,
        )


@dataclass(frozen=True, kw_only=True)
class NgramScore:
    """Cross-entropies in nats, summed over `count` scored words; scores add up over batches.

    Attributes:
        unigram: of a word from its frequency alone.
        bigram: of a word from its true left neighbour, even where the model sees [MASK] there.
        count: scored words.
    """

    unigram: float = 0.0
    bigram: float = 0.0
    count: int = 0

    def __add__(self, other: "NgramScore") -> "NgramScore":
        return NgramScore(
            unigram=self.unigram + other.unigram,
            bigram=self.bigram + other.bigram,
            count=self.count + other.count,
        )


class NgramEntropy:
    """Word frequencies of the training texts, alone and after the left neighbour.

    Smoothing. Unigram: p(w) = (n(w) + 0.1) / (n + 0.1 V). Bigram: p(w | u) = (n(u w) + p(w)) / (n(u) + 1),
    that is one observation's worth of the unigram law (a Dirichlet prior); a text's first word follows a
    start mark.
    """

    def __init__(self, vocab: int) -> None:
        """Take the number of token ids, V."""
        self.vocab = vocab
        self._count_V = np.zeros(vocab, np.int64)
        self._follows_V = np.zeros(
            vocab + 1, np.int64
        )  # how often anything came after u; V is the start mark
        self._pairs: NDArray[np.int64] = np.zeros(0, np.int64)  # u * V + w, ascending
        self._pair_counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []

    def add(self, ids_BL: ArrayLike | Tensor) -> None:
        """Count training texts in: int [B, L] token ids without masks, padded with PAD at the end."""
        ids_BL = np.asarray(ids_BL).astype(np.int64)
        real_BL = ids_BL != PAD
        words, lefts = ids_BL[real_BL], self._left_of(ids_BL)[real_BL]
        self._count_V += np.bincount(words, minlength=self.vocab)
        self._follows_V += np.bincount(lefts, minlength=self.vocab + 1)
        self._pending.append(lefts * self.vocab + words)
        if sum(map(len, self._pending)) > _PENDING:
            self._merge()

    def score(
        self,
        ids_BL: ArrayLike | Tensor,
        text_S: ArrayLike | Tensor,
        position_S: ArrayLike | Tensor,
        labels_S: ArrayLike | Tensor,
    ) -> NgramScore:
        """Score the words a model was asked for.

        Args:
            ids_BL: int [B, L], the texts; masked words may stand in them, the labels are put back first.
            text_S: int [S], rows of the words asked for.
            position_S: int [S], their positions in the text.
            labels_S: int [S], their ids.
        """
        self._merge()
        row, place, words = (np.asarray(part).astype(np.int64) for part in (text_S, position_S, labels_S))
        ids_BL = np.array(ids_BL).astype(np.int64)
        ids_BL[row, place] = words
        lefts = self._left_of(ids_BL)[row, place]

        total = self._count_V.sum()
        unigram = (self._count_V[words] + UNIGRAM_PSEUDO) / (total + UNIGRAM_PSEUDO * self.vocab)
        bigram = (self._count_of(lefts * self.vocab + words) + BIGRAM_PSEUDO * unigram) / (
            self._follows_V[lefts] + BIGRAM_PSEUDO
        )
        return NgramScore(
            unigram=float(-np.log(unigram).sum()), bigram=float(-np.log(bigram).sum()), count=len(words)
        )

    def _left_of(self, ids_BL: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return each position's left neighbour, the start mark V at the first."""
        start_B1 = np.full((len(ids_BL), 1), self.vocab)
        return np.concatenate((start_B1, ids_BL[:, :-1]), axis=1)

    def _merge(self) -> None:
        """Count pending pairs into the sorted table; V * V counts would not fit a real vocabulary."""
        if not self._pending:
            return
        pairs, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending = []
        merged, inverse = np.unique(np.concatenate((self._pairs, pairs)), return_inverse=True)
        totals = np.bincount(
            inverse, weights=np.concatenate((self._pair_counts, counts)), minlength=len(merged)
        )
        self._pairs, self._pair_counts = merged, totals.astype(np.int64)

    def _count_of(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        if not len(self._pairs):
            return np.zeros(len(pairs), np.int64)
        place = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        return np.where(self._pairs[place] == pairs, self._pair_counts[place], 0)
