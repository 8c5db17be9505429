"""What a step computes: masks, mixtures and losses, the same on any number of ranks and micro-batches.

Shape suffixes: B samples, L positions, T tokens of a packed batch, K visible, M masked, S scored words.
"""

from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import shape_of, tiny_settings
from torch import Tensor

from mnemos.engine.encoder import Encoder, patch_edges
from mnemos.engine.objectives import Pretrainer, encode, local_count, visible_patches
from mnemos.engine.patches import all_patches, patch_statistics
from mnemos.engine.preparing import (
    ImageRows,
    Phase,
    Preparer,
    Rows,
    TextBatch,
    TextRows,
    TextsReady,
    next_partner,
)
from mnemos.engine.settings import Settings
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import RawBatch, Request, read_batch, stream
from mnemos.sharding.tokenizer import MASK, PAD, SPECIAL_TOKENS, load_tokenizer, starts_word

NAMES = ("report", "xray", "ct", "pathology")
PHASES: tuple[Phase, ...] = ("pretext", "rehearsal")


class Bench:
    """A preparer with data of one modality."""

    def __init__(self, sets: Path, name: str, settings: Settings | None = None) -> None:
        self.settings = settings or tiny_settings()
        self.shape = shape_of(self.settings, sets)
        self.shards = ShardSet(sets / name, "train")
        self.starts_word_V = torch.from_numpy(starts_word(load_tokenizer(sets / "report" / "tokenizer.json")))
        self.preparer = Preparer(self.settings, self.shape, self.starts_word_V, stream="test")

    def raw(self, samples: list[int], places: list[int] | None = None) -> RawBatch:
        request = Request(
            step=0,
            member=0,
            samples=np.array(samples),
            places=np.array(places if places else samples, dtype=np.int64),
        )
        return read_batch([self.shards], request).to(torch.device("cpu"))

    def rows(self, raw: RawBatch, phase: Phase = "pretext", training: bool = True) -> Rows:
        manifest = self.shards.manifest
        if manifest.kind == "text":
            return self.preparer.texts(raw, phase=phase, training=training)
        return self.preparer.images(manifest, raw, phase=phase, training=training)

    def model(self) -> Pretrainer:
        torch.manual_seed(0)
        return Pretrainer(Encoder(self.shape), self.settings)

    def loss(self, model: Pretrainer, rows: Rows, phase: Phase) -> Tensor:
        patches = None if isinstance(rows, TextRows) else visible_patches(self.shape, rows, torch.float32)
        target = None
        if phase == "rehearsal":
            torch.manual_seed(1)
            teacher = Encoder(self.shape).eval()
            target = encode(teacher, replace(rows, keep=None), patches).detach()
        return model(rows, patches, target)


def same(one: Rows, two: Rows) -> None:
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(two, field.name)
        equal = torch.equal(left, right) if isinstance(left, Tensor) else left == right
        assert equal, field.name


# Masks of patches


@pytest.mark.parametrize(("name", "num_patches"), [("xray", 64), ("ct", 64), ("pathology", 64)])
def test_visible_and_masked_patches_are_a_partition(tiny_sets: Path, name: str, num_patches: int) -> None:
    bench = Bench(tiny_sets, name)
    rows = bench.rows(bench.raw(list(range(8))))
    assert isinstance(rows, ImageRows)
    assert rows.visible_BK.shape == (8, num_patches // 4) and rows.masked_BM.shape == (
        8,
        num_patches * 3 // 4,
    )
    together = torch.cat([rows.visible_BK, rows.masked_BM], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(num_patches).expand(8, -1))
    assert (rows.visible_BK.diff(dim=1) > 0).all() and (rows.masked_BM.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in rows.visible_BK.tolist()}) == 8


# Ranks and micro-batches


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_and_its_halves_are_prepared_alike(tiny_sets: Path, name: str, phase: Phase) -> None:
    bench = Bench(tiny_sets, name)
    samples, places = [3, 17, 5, 5, 0, 29, 11, 8], [56, 57, 58, 59, 60, 61, 62, 63]
    whole = bench.rows(bench.raw(samples, places), phase)
    for half in (slice(0, 4), slice(4, 8)):
        part = bench.rows(bench.raw(samples[half], places[half]), phase)  # as another rank reads it
        same(part, whole.rows(half.start, half.stop))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_sum_to_the_loss_of_the_batch(tiny_sets: Path, name: str, phase: Phase) -> None:
    bench = Bench(tiny_sets, name)
    model = bench.model()
    rows = bench.rows(bench.raw(list(range(8))), phase)
    whole = bench.loss(model, rows, phase)
    parts = sum(bench.loss(model, rows.rows(start, start + 4), phase) for start in (0, 4))
    assert whole.item() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    counts = [int(local_count(part, phase)) for part in (rows, rows.rows(0, 4), rows.rows(4, 8))]
    assert counts[0] == counts[1] + counts[2] > 0


# Losses


@pytest.mark.parametrize("name", ["xray", "ct", "pathology"])
def test_the_image_loss_is_its_definition(tiny_sets: Path, name: str) -> None:
    bench = Bench(tiny_sets, name)
    model = bench.model()
    raw = bench.raw(list(range(4)))
    rows = bench.rows(raw, training=False)
    assert isinstance(rows, ImageRows)
    patches = visible_patches(bench.shape, rows, torch.float32)
    predicted_BMP = model.predict(rows, encode(model.encoder, rows, patches))
    patch, channels = patch_edges(bench.shape, rows.kind)
    values_BLP = all_patches(
        raw.data, patch=patch, channels=channels, scale_B=raw.scale_B, shift_B=raw.shift_B
    )
    mean, deviation = patch_statistics(values_BLP)
    target_BLP = (values_BLP - mean) / deviation
    place = rows.masked_BM[..., None].expand_as(predicted_BMP)
    expected = (predicted_BMP - target_BLP.gather(1, place)).square().mean(dim=2).sum()
    torch.testing.assert_close(model(rows, patches), expected, rtol=1e-5, atol=0)
    assert local_count(rows, "pretext") == 4 * 48
    assert local_count(rows, "rehearsal") == 4 * (1 + 16)
    seen = rows.visible_BK[..., None].expand(-1, -1, values_BLP.shape[2])
    torch.testing.assert_close(patches, values_BLP.gather(1, seen))


@pytest.mark.parametrize("name", NAMES)
def test_distillation_starts_at_exactly_zero(tiny_sets: Path, name: str) -> None:
    bench = Bench(tiny_sets, name, tiny_settings(model__drop_path=0.5))
    student = bench.model().eval()
    teacher = Encoder(bench.shape)
    teacher.load_state_dict(student.encoder.state_dict())
    teacher.eval()
    rows = bench.rows(bench.raw(list(range(8))), "rehearsal")
    patches = None if isinstance(rows, TextRows) else visible_patches(bench.shape, rows, torch.float32)
    target = encode(teacher, replace(rows, keep=None), patches).detach()
    assert student(replace(rows, keep=None), patches, target).item() == 0.0
    assert student(rows, patches, target).item() > 0.0, "DropPath is the student's alone"
    moved = {name: value + 0.1 for name, value in teacher.state_dict().items()}
    teacher.load_state_dict(moved)
    other = encode(teacher, replace(rows, keep=None), patches).detach()
    assert student(replace(rows, keep=None), patches, other).item() > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_distilled_and_the_factor_scales(tiny_sets: Path, name: str) -> None:
    bench = Bench(tiny_sets, name)
    student = bench.model()
    rows = bench.rows(bench.raw(list(range(8))), "rehearsal")
    patches = None if isinstance(rows, TextRows) else visible_patches(bench.shape, rows, torch.float32)
    features = encode(student.encoder, rows, patches)
    target = torch.randn(features.shape)
    expected = (features - target).square().mean(dim=2).sum()
    torch.testing.assert_close(student(rows, patches, target), expected)
    factor = torch.tensor(0.25)
    torch.testing.assert_close(student(rows, patches, target, factor), expected * 0.25)
    if isinstance(rows, ImageRows):
        torch.testing.assert_close(student(rows, patches, None, factor), student(rows, patches) * 0.25)
    assert local_count(rows, "rehearsal") == features.shape[0] * features.shape[1]


# Training against validation


@pytest.mark.parametrize("name", NAMES)
def test_validation_neither_crops_nor_drops(tiny_sets: Path, name: str) -> None:
    bench = Bench(tiny_sets, name)
    raw = bench.raw(list(range(8)))
    rows = bench.rows(raw, training=False)
    assert rows.keep is None
    same(rows, bench.rows(raw, training=False))  # the same masks every time
    trained = bench.rows(raw, training=True)
    assert trained.keep is not None and trained.keep.shape == (8, 2 * bench.shape.depth)
    if isinstance(rows, ImageRows) and isinstance(trained, ImageRows):
        assert torch.equal(rows.images, raw.data) and rows.flip_BA is None
        assert rows.partner_B is None and rows.weight_B is None
        if bench.shards.manifest.augment == "crop":
            assert not torch.equal(trained.images, raw.data) and trained.flip_BA is None
        else:
            assert torch.equal(trained.images, raw.data) and trained.flip_BA is not None
            assert trained.flip_BA.any()


def test_rehearsed_images_are_mixed_but_not_cropped(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "xray")
    raw = bench.raw(list(range(32)))
    rows = bench.rows(raw, "rehearsal")
    assert isinstance(rows, ImageRows) and rows.partner_B is not None and rows.weight_B is not None
    assert torch.equal(rows.images, raw.data) and rows.flip_BA is None
    for run in range(0, 32, 4):
        assert sorted(rows.partner_B[run : run + 4].tolist()) == list(range(run, run + 4)), (
            "within runs of mix_group"
        )
    assert not torch.equal(rows.partner_B, torch.arange(32))
    assert rows.weight_B.unique().numel() == 32 and rows.weight_B.min() >= 0 and rows.weight_B.max() < 1
    plain = Bench(tiny_sets, "xray", tiny_settings(rehearsal__mixup=False)).rows(raw, "rehearsal")
    assert isinstance(plain, ImageRows) and plain.partner_B is None


def test_branches_are_dropped_at_the_set_rate() -> None:
    settings = tiny_settings(model__depth=8, model__drop_path=0.25)
    preparer = Preparer(settings, shape_of(settings), None, stream="test")
    keep = preparer._keep(torch.arange(2000), training=True)
    assert keep is not None and keep.shape == (2000, 16)
    assert keep.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (keep == 0).float().mean(dim=0) == pytest.approx(torch.full((16,), 0.25), abs=0.05)
    assert float(keep.mean()) == pytest.approx(1.0, abs=0.01)
    none = tiny_settings(model__drop_path=0.0)
    assert Preparer(none, shape_of(none), None, stream="test")._keep(torch.arange(4), training=True) is None


def test_the_control_shows_patches_of_another_sample(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "xray", tiny_settings(training__shuffle_visible=True))
    for samples in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]):  # validation has batches of any size
        raw = bench.raw(samples)
        rows = bench.rows(raw, training=False)
        assert isinstance(rows, ImageRows) and rows.partner_B is not None
        others = bench.raw([samples[partner] for partner in rows.partner_B.tolist()], samples)
        honest = Bench(tiny_sets, "xray").rows(others, training=False)
        assert isinstance(honest, ImageRows)
        shown = visible_patches(bench.shape, rows, torch.float32)
        torch.testing.assert_close(shown, visible_patches(bench.shape, honest, torch.float32))
    assert next_partner(6, 4, torch.device("cpu")).tolist() == [1, 2, 3, 0, 5, 4]
    assert next_partner(8, 4, torch.device("cpu")).tolist() == [1, 2, 3, 0, 5, 6, 7, 4]


# Texts


def words_of(bench: Bench, ids: list[int]) -> list[list[int]]:
    """Return the positions of each word."""
    starts = bench.starts_word_V[torch.tensor(ids)].tolist()
    number, words = -1, []
    for position, begins in enumerate(starts):
        number += begins or position == 0
        words.append((number, position))
    return [[position for _, position in group] for _, group in groupby(words, key=lambda pair: pair[0])]


def unpacked(rows: TextRows, width: int, values: Tensor | None = None, empty: int = PAD) -> Tensor:
    """Return [B, width]: ids (or `values`) of the packed tokens at their positions, `empty` elsewhere."""
    out = torch.full((rows.num_samples, width), empty)
    for number in range(rows.num_samples):
        part = slice(*rows.bounds[number : number + 2])
        out[number, rows.position_T[part]] = (rows.ids_T if values is None else values)[part]
    return out


def masked(tiny_sets: Path, ratio: float) -> tuple[Bench, Tensor, TextRows, Tensor]:
    """Return 1,600 masked texts, their ids before, and bool [B, L], True where a word is scored."""
    bench = Bench(tiny_sets, "report", tiny_settings(training__word_ratio=ratio))
    raw = bench.raw(list(range(32)) * 50, list(range(1600)))
    rows = bench.rows(raw)
    assert isinstance(rows, TextRows) and rows.scored_S is not None
    assert rows.scored_S.unique().numel() == rows.scored_S.numel(), "no position is scored twice"
    scored_T = torch.zeros_like(rows.ids_T)
    scored_T[rows.scored_S] = 1
    return bench, raw.data, rows, unpacked(rows, raw.data.shape[1], scored_T, empty=0).bool()


def test_texts_are_packed_without_padding(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "report")
    raw = bench.raw(list(range(32)))
    lengths = (raw.data != PAD).sum(1)
    assert lengths.min() < lengths.max()
    rows = bench.rows(raw, training=False)
    assert isinstance(rows, TextRows)
    assert len(rows.ids_T) == len(rows.position_T) == int(lengths.sum())
    assert rows.offsets_B1.dtype == torch.int32 and tuple(rows.offsets_B1.tolist()) == rows.bounds
    assert rows.offsets_B1.diff().equal(lengths.int()) and rows.packing.longest == int(lengths.max())
    assert torch.cat([torch.arange(length) for length in lengths.tolist()]).equal(rows.position_T)
    part = rows.rows(3, 9)
    assert part.packing.longest == int(lengths[3:9].max()) and part.bounds[0] == part.scored_bounds[0] == 0


def test_words_are_masked_whole(tiny_sets: Path) -> None:
    bench, ids_BL, rows, scored_BL = masked(tiny_sets, 0.15)
    num_words = num_scored = pieces = 0
    for number in range(1600):
        ids = ids_BL[number][ids_BL[number] != PAD].tolist()
        words = words_of(bench, ids)
        scored = [sum(scored_BL[number, word].tolist()) for word in words]
        assert all(count in (0, len(word)) for count, word in zip(scored, words, strict=True)), (
            "part of a word"
        )
        assert sum(scored) > 0, "nothing to learn from this text"
        assert sum(scored) == rows.scored_bounds[number + 1] - rows.scored_bounds[number]
        num_words += len(words)
        num_scored += sum(count > 0 for count in scored)
        pieces += sum(len(word) > 1 for word in words)
    assert pieces > 1000, "the texts must have words of several pieces"
    assert num_scored / num_words == pytest.approx(0.15, abs=0.01)
    assert not (scored_BL & (ids_BL == PAD)).any()


def test_labels_are_the_words_that_stood_there(tiny_sets: Path) -> None:
    _, ids_BL, rows, scored_BL = masked(tiny_sets, 0.15)
    shown_BL = unpacked(rows, ids_BL.shape[1])
    assert rows.labels_S is not None and rows.labels_S.equal(ids_BL[scored_BL])
    assert torch.equal(shown_BL[~scored_BL], ids_BL[~scored_BL]), "what is not scored is shown as it is"
    assert local_count(rows, "pretext") == int(scored_BL.sum())
    assert local_count(rows, "rehearsal") == int((ids_BL != PAD).sum())


def test_scored_words_are_hidden_replaced_or_kept(tiny_sets: Path) -> None:
    bench, ids_BL, rows, scored_BL = masked(tiny_sets, 0.15)
    before, after = ids_BL[scored_BL], unpacked(rows, ids_BL.shape[1])[scored_BL]
    assert len(before) > 5000
    hidden, kept = after == MASK, after == before
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.015)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.015)
    random = after[~hidden & ~kept]
    assert random.min() >= len(SPECIAL_TOKENS) and random.max() < len(bench.starts_word_V)
    assert random.unique().numel() > 0.6 * len(bench.starts_word_V), "drawn from the whole vocabulary"


def coded_texts(lengths: list[int], places: list[int], width: int = 64) -> RawBatch:
    """Return texts whose every token tells its row: 10 + row."""
    ids_BL = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        ids_BL[row, :length] = 10 + row
    ones = torch.ones(len(lengths))
    return RawBatch(step=0, member=0, data=ids_BL, scale_B=ones, shift_B=ones, place_B=torch.tensor(places))


def test_mixed_texts_keep_places_and_drop_the_chosen_padding(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "report")
    lengths = [64, 5, 40, 13, 2, 64, 30, 7]
    holes = 0
    for step in range(20):
        raw = coded_texts(lengths, list(range(8 * step, 8 * step + 8)))
        rows = bench.rows(raw, "rehearsal")
        assert isinstance(rows, TextRows) and rows.scored_S is None and rows.labels_S is None
        assert (rows.ids_T != PAD).all(), "nothing but tokens"
        ids_BL = unpacked(rows, 64)
        for row in range(8):
            ids, valid = ids_BL[row], ids_BL[row] != PAD
            sources = {int(token) - 10 for token in ids[valid]}
            assert len(sources) <= 2 and all(source // 4 == row // 4 for source in sources)
            begin, end = rows.bounds[row : row + 2]
            assert rows.position_T[begin:end].equal(valid.nonzero()[:, 0]), "in order, each at its place"
            for source in sources:  # a kept token stands where it stood in its source
                assert int((ids == 10 + source).nonzero().max()) < lengths[source]
            last = int(valid.nonzero().max())
            holes += int((~valid[:last]).sum())
            assert bool(valid[0]), "both sources begin with a token"
    assert holes > 0, "a position that is padding in the chosen source leaves a hole"


def test_one_share_for_the_whole_batch(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "report")
    shares = []
    for step in range(30):
        raw = coded_texts([64] * 8, list(range(8 * step, 8 * step + 8)))
        rows = bench.rows(raw, "rehearsal")
        ids_BL = unpacked(rows, 64)
        mixed = [row for row in range(8) if ids_BL[row].unique().numel() == 2]
        own = [float((ids_BL[row] == 10 + row).float().mean()) for row in mixed]
        if own:
            shares.append(np.mean(own))
            assert np.std(own) < 0.15, "64 draws with one chance scatter by 0.06"
    assert np.std(shares) > 0.2 and 0.3 < np.mean(shares) < 0.7, "uniform from batch to batch"


def test_short_texts_of_one_token_are_scored_and_mixed(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "report")
    raw = coded_texts([1, 1, 2, 1], [0, 1, 2, 3], width=2)
    rows = bench.preparer.texts(raw, phase="pretext", training=True)
    assert all(end > begin for begin, end in zip(rows.scored_bounds, rows.scored_bounds[1:], strict=False))
    model = bench.model()
    assert torch.isfinite(model(rows))
    mixed = bench.preparer.texts(raw, phase="rehearsal", training=True)
    assert torch.isfinite(encode(model.encoder, mixed, None)).all()


def _two_batches() -> list[Request]:
    numbers = np.arange(8)
    return [Request(step=step, member=0, samples=numbers, places=numbers + 8 * step) for step in (0, 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_are_made_ready_where_they_are_read(tiny_sets: Path, workers: int) -> None:
    bench = Bench(tiny_sets, "report")
    ready = TextsReady(preparers=[bench.preparer], kinds=["text"], phases=["pretext"])
    found = list(stream([bench.shards], _two_batches, ready=ready, workers=workers, pin=False))
    assert [batch.step for batch in found] == [0, 1]
    for batch in found:
        assert isinstance(batch, TextBatch)
        places = [int(place) for place in range(8 * batch.step, 8 * batch.step + 8)]
        same(batch.rows, bench.rows(bench.raw(list(range(8)), places)))
