"""What the step bench computes on: shard sets, a stage of each kind of data, its batches, and the same for the reference.

A stage under measurement has its own modality as the current one and once more as a rehearsed one, so that a single
stage has both phases. Its encoder starts from drawn weights in which no bias is 0, no gain is 1 and LayerScale is of
weight: a difference between two models shows in their losses.

Shape suffixes: B samples, L token positions, T = tokens of a packed batch, A axes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.bench.step_reference import Images, Texts
from mnemos.engine.arguments import parse
from mnemos.engine.curriculum import BUFFER, Plan, Stage, make_plan
from mnemos.engine.encoder import Encoder, ImageKind, patch_edges
from mnemos.engine.preparing import ImageRows, Phase, Rows, TextBatch, TextRows, pack_texts
from mnemos.engine.run_directory import WEIGHTS
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_model import encoder_shape
from mnemos.engine.stage_training import StageTraining
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES
from mnemos.sharding.stream import RawBatch, Request, read_batch
from mnemos.sharding.tokenizer import PAD

KINDS = tuple(dict.fromkeys(MODALITIES[name].kind for name in DEFAULT_ORDER))
PHASES: tuple[Phase, ...] = ("pretext", "rehearsal")
MANY_UPDATES = 2000  # of a schedule: enough that both sets have their turns
LEARNING_RATE = 1e-5  # small: a bench does not train, and nothing may run away
MOST_GROUP = 16  # samples of a mixing run
OFF = {"training.compile": False, "training.graphs": "never"}  # of the plain sides


@dataclass(frozen=True)
class OneSet:
    """The first slots of one set in a schedule, in the schedule's place."""

    schedule: Any
    member: int
    steps: int

    def slots(self, step: int) -> Iterator[Any]:
        """Yield the slots from update `step` of the schedule on."""
        return islice((slot for slot in self.schedule.slots(step) if slot.member == self.member), self.steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.schedule, name)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The shard sets of a bench by kind, and where it may write.

    Attributes:
        sets: folder of the shard set measured, by kind.
        folder: for what stages need on disk.
        preset, batch, assignments: of the settings; assignments as `--set` takes them.
    """

    sets: dict[str, Path]
    folder: Path
    preset: str
    batch: int
    assignments: Sequence[str] = ()


def plan_of(data: Data, kind: str, *, vocab: int | None, precision: str, more: Sequence[str] = ()) -> Plan:
    """Return a plan whose last stage is one of this kind that rehearses its own kind; its encoder is on disk.

    Args:
        data: to train on.
        kind: of data.
        vocab: rows of the word table; None for the tokenizer's own.
        precision: fp32 or bf16.
        more: settings as `--set` takes them; the last of the same name counts.

    Raises:
        UserError: settings or shards do not fit each other.
    """
    names = {kind: load_manifest(place).name for kind, place in data.sets.items()}
    wanted = [names[one] for one in ("text", kind) if one in names]
    order = list(dict.fromkeys(wanted))
    given = [
        f"training.batch={data.batch}",
        f"training.micro_batch={data.batch}",
        f"rehearsal.mix_group={min(MOST_GROUP, data.batch)}",
        f"training.steps={MANY_UPDATES}",
        f"training.base_lr={LEARNING_RATE * 256 / data.batch}",
        f"training.precision={precision}",
        f"curriculum.stages=[{','.join(order)}]",
        *data.assignments,
        *more,
    ]
    sets = [part for text in given for part in ("--set", text)]
    flags = ["--stage", order[-1], "--run", str(data.folder / "run"), "--preset", data.preset, *sets]
    root = data.folder / f"sets-{'-'.join(order)}"
    root.mkdir(exist_ok=True)
    for one in ("text", kind):
        if one in names and not (root / names[one]).exists():
            (root / names[one]).symlink_to(data.sets[one])
    plan = make_plan(parse([*flags, "--data", str(root)]), 1)
    *others, own = (_with_vocabulary(stage, vocab) for stage in plan.stages)
    stages = [*others, own, own]
    stages = [
        replace(stage, number=number, directory=data.folder / f"{own.name}-{vocab or 'own'}-{number}")
        for number, stage in enumerate(stages, start=1)
    ]
    plan = replace(plan, stages=tuple(stages), todo=(stages[-1],))
    for stage in stages[:-1]:
        _pretend_done(stage, plan)
    return plan


def _with_vocabulary(stage: Stage, vocab: int | None) -> Stage:
    tokenizer = stage.manifest.tokenizer
    if vocab is None or tokenizer is None:
        return stage
    if vocab < tokenizer.vocab_size:
        raise UserError(
            f"a vocabulary of {vocab} rows is too small: the shards' tokenizer has {tokenizer.vocab_size} ids"
        )
    return replace(stage, manifest=replace(stage.manifest, tokenizer=replace(tokenizer, vocab_size=vocab)))


def _pretend_done(stage: Stage, plan: Plan) -> None:
    """Lay a stage's set down as its buffer, and drawn weights as its encoder."""
    stage.directory.mkdir(parents=True, exist_ok=True)
    buffer = stage.directory / BUFFER
    if not buffer.exists():
        assert stage.data is not None
        buffer.symlink_to(Path(stage.data).resolve())
    if stage.number == len(plan.stages) - 1:
        from safetensors.torch import save_file

        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(drawn_weights(Encoder(encoder_shape(plan))), stage.directory / WEIGHTS)


@torch.no_grad()
def drawn_weights(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return a module's weights moved away from where they start: gains from 1, biases from 0, LayerScale to 0 to 0.2."""
    random = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, value in module.state_dict().items():
        noise = torch.rand(value.shape, generator=random)
        if name.rpartition(".")[2].startswith("scale_"):
            drawn[name] = 0.2 * noise
        else:
            drawn[name] = value + (0.1 if value.ndim < 2 else 0.01) * (noise - 0.5)
    return drawn


def make_training(
    data: Data,
    kind: str,
    *,
    vocab: int | None,
    precision: str,
    plain: bool = False,
    more: Sequence[str] = (),
    deepspeed: dict[str, Any] | None = None,
) -> StageTraining:
    """Return a stage under way; `plain` switches off what the engine would compile or capture by itself."""
    off = [f"{key}={value}" for key, value in OFF.items()] if plain else []
    plan = plan_of(data, kind, vocab=vocab, precision=precision, more=[*more, *off])
    training = StageTraining(replace(plan, deepspeed=deepspeed), plan.stages[-1])
    training.engine.optimizer.set_rate(LEARNING_RATE)
    return training


def member_of(training: StageTraining, phase: Phase) -> int:
    """Return the set of a stage that a phase trains on: the current one, or the last rehearsed."""
    return CURRENT if phase == "pretext" else len(training.sets) - 1


def raw_batches(training: StageTraining, phase: Phase, num: int) -> list[RawBatch | TextBatch]:
    """Return the first batches of a phase, on the device, in memory of their own."""
    schedule, training.schedule = training.schedule, only(training, phase, num)  # type: ignore[assignment]
    try:
        batches = [_owned(raw).to(training.device) for raw in training.batches(0)]
    finally:
        training.schedule = schedule
    if len(batches) < num:
        raise UserError(f"{num} batches are asked for, a schedule has {len(batches)}; ask for fewer")
    return batches


def only(training: StageTraining, phase: Phase, num: int) -> OneSet:
    """Return the first updates of a phase, in the place of a stage's schedule."""
    whole = training.schedule
    return OneSet(getattr(whole, "schedule", whole), member_of(training, phase), num)


def _owned(raw: RawBatch | TextBatch) -> RawBatch | TextBatch:
    return replace(raw, data=raw.data.clone()) if isinstance(raw, RawBatch) else raw


def rows_of(training: StageTraining, raw: RawBatch | TextBatch, phase: Phase) -> Rows:
    """Return a batch made ready as `StageTraining.train_step` does."""
    if isinstance(raw, TextBatch):
        return raw.rows
    member = member_of(training, phase)
    manifest = training.sets[member].manifest
    return training.preparers[member].images(manifest, raw, phase=phase, training=True)


def for_reference(training: StageTraining, rows: Rows) -> Images | Texts:
    """Return the same batch as the authors' loader gives it: fp32 pixels, or padded ids."""
    depth = 2 * training.shape.depth
    keep = torch.ones(rows.num_samples, depth, device=training.device) if rows.keep is None else rows.keep
    if isinstance(rows, TextRows):
        return _padded(rows, keep, training.sets[-1].manifest.shape[0])
    channels = patch_edges(training.shape, rows.kind)[1]
    return Images(
        kind=rows.kind,
        pixels=_pixels(rows, channels),
        visible_BK=rows.visible_BK,
        masked_BM=rows.masked_BM,
        keep=keep,
        partner_B=rows.partner_B,
        weight_B=rows.weight_B,
    )


def _pixels(rows: ImageRows, channels: int) -> Tensor:
    each = (-1, *(1,) * (rows.images.dim() - 1))
    values = rows.images.float() * rows.scale_B.view(each) + rows.shift_B.view(each)
    if rows.flip_BA is not None:
        flips = [
            [2 + axis for axis in range(len(flip_A)) if flip_A[axis]] for flip_A in rows.flip_BA.tolist()
        ]
        values = torch.stack(
            [one.flip([a - 1 for a in axes]) for one, axes in zip(values, flips, strict=True)]
        )
    return values.expand(-1, channels, *values.shape[2:]).contiguous()


def _padded(rows: TextRows, keep: Tensor, length: int) -> Texts:
    device, B = rows.ids_T.device, rows.num_samples
    text_T = torch.repeat_interleave(torch.arange(B, device=device), rows.offsets_B1.diff().long())
    ids_BL = torch.zeros(B, length, dtype=torch.int64, device=device)
    valid_BL = torch.zeros(B, length, dtype=torch.bool, device=device)
    labels_BL = torch.full((B, length), -100, device=device)
    ids_BL[text_T, rows.position_T], valid_BL[text_T, rows.position_T] = rows.ids_T, True
    if rows.scored_S is not None and rows.labels_S is not None:
        labels_BL[text_T[rows.scored_S], rows.position_T[rows.scored_S]] = rows.labels_S
    return Texts(ids_BL=ids_BL, valid_BL=valid_BL, labels_BL=labels_BL, keep=keep)


def whole_batches(training: StageTraining, num: int, batch: int) -> list[Images | Texts]:
    """Return the first `num` samples of the split a stage embeds, as the authors' loader gives them, nothing masked.

    Raises:
        UserError: the split holds fewer.
    """
    shards, device = training.sets[CURRENT], training.device
    if len(shards) < num:
        raise UserError(
            f"{shards.store.root}: its training split holds {len(shards)} samples, {num} are to be embedded; give "
            "fewer --steps or a larger set"
        )
    found: list[Images | Texts] = []
    for start in range(0, num, batch):
        numbers = np.arange(start, start + batch)
        raw = read_batch([shards], Request(step=0, member=0, samples=numbers, places=numbers))
        if shards.manifest.kind == "text":
            found.append(for_reference(training, pack_texts(raw.data, raw.data != PAD).to(device)))
            continue
        raw = raw.to(device)
        kind: ImageKind = "image" if shards.manifest.kind == "image" else "volume"
        nowhere = torch.empty(batch, 0, dtype=torch.int64, device=device)
        rows = ImageRows(
            kind=kind,
            images=raw.data,
            scale_B=raw.scale_B,
            shift_B=raw.shift_B,
            visible_BK=nowhere,
            masked_BM=nowhere,
        )
        found.append(for_reference(training, rows))
    return found
