"""The rows of the step bench: what must hold before anything is timed, and the timing of every phase of a kind of data."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mnemos.bench import step_rates as rates
from mnemos.bench.step_inputs import (
    LEARNING_RATE,
    Data,
    for_reference,
    make_training,
    raw_batches,
    rows_of,
    whole_batches,
)
from mnemos.bench.step_reference import Inputs
from mnemos.bench.step_reference_training import ReferenceTraining
from mnemos.bench.step_sides import (
    COMPILED,
    OURS,
    PLAIN,
    REFERENCE,
    EmbeddingWork,
    Side,
    compile_blocks,
    embedding_encoder,
    embedding_side,
    prove_plain,
    reference_embedding_side,
    reference_side,
    shards_side,
    training_side,
)
from mnemos.bench.step_timing import measure, summary, warm_up
from mnemos.engine.preparing import ImageRows, Phase
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_training import StageTraining

BenchPhase = Literal["pretext", "rehearsal", "embedding"]
BENCH_PHASES: tuple[BenchPhase, ...] = ("pretext", "rehearsal", "embedding")
CLOSE = 1e-5  # relative, between the fp32 losses of ours and the reference
TEXT_PASSES = 4  # an embedding window has so many times as many texts: they are short


class Refused(Exception):
    """Why nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured of one kind of data.

    Attributes:
        data: shard sets and settings.
        kind: of data.
        vocab: rows of the word table; None for the tokenizer's own.
        phases: to be measured.
        steps: batches of a window.
        rounds: windows of every side.
        compiled: whether torch.compile is measured.
        end_to_end: whether ours is measured with reading, too.
    """

    data: Data
    kind: str
    vocab: int | None
    phases: Sequence[BenchPhase]
    steps: int
    rounds: int
    compiled: bool
    end_to_end: bool

    @property
    def title(self) -> str:
        """The kind, and the vocabulary where it is not the tokenizer's own."""
        return self.kind if self.vocab is None else f"{self.kind}, {self.vocab:,} words"

    @property
    def num_embedded(self) -> int:
        """Samples of an embedding window."""
        return self.data.batch * self.steps * (TEXT_PASSES if self.kind == "text" else 1)


def make_reference(training: StageTraining, *, bf16: bool) -> ReferenceTraining:
    """Return the reference with a stage's present weights and its teacher's."""
    return ReferenceTraining(
        training.shape,
        training.settings,
        training.engine.full_weights(),
        None if training.teacher is None else training.teacher.state_dict(),
        training.device,
        bf16=bf16,
        rate=LEARNING_RATE,
    )


def check_losses(task: Task) -> dict[str, float]:
    """Compare the fp32 losses of ours and the reference on every phase's first batch; return the relative differences.

    Raises:
        Refused: one is more than `CLOSE`.
    """
    training = make_training(task.data, task.kind, vocab=task.vocab, precision="fp32")
    found: dict[str, float] = {phase: _difference(task, training, phase) for phase in task.phases}
    release(training)
    for phase, difference in found.items():
        if not difference <= CLOSE:  # so that NaN is refused, too
            raise Refused(
                f"{task.title}, {phase}: the fp32 losses of ours and the reference differ by {difference:.1e}, at most "
                f"{CLOSE:.0e} is allowed; nothing was timed"
            )
    return found


def _difference(task: Task, training: StageTraining, phase: BenchPhase) -> float:
    reference = make_reference(training, bf16=False)
    if phase == "embedding":
        batch = task.data.batch
        work = EmbeddingWork.of(training.sets[CURRENT], batch, batch, training.device)
        ours = work.embed(embedding_encoder(training, bf16=False), work.ready())
        (inputs,) = whole_batches(training, batch, batch)
        return relative(ours, reference.embed(inputs))
    (raw,) = raw_batches(training, phase, 1)
    theirs = reference.loss(for_reference(training, rows_of(training, raw, phase)), phase)
    return relative(training.train_step(raw).detach(), theirs.detach())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the distance of two results over the length of ours."""
    return float((ours.double() - theirs.double()).norm() / ours.double().norm())


def check_rates(task: Task, precision: str) -> list[str]:
    """Hold the reference's forward and backward against the published rates; return what to print.

    Raises:
        Refused: it reaches less than `LEAST_SHARE` of one.
    """
    told = []
    training = make_training(task.data, task.kind, vocab=task.vocab, precision=precision)
    reference = make_reference(training, bf16=precision == "bf16")
    for phase in task.phases:
        inputs = reference_inputs(task, training, phase, 1)[0]
        run = _forward_backward(reference, inputs, phase)
        published = rates.published_rate(task.kind, phase, precision)
        rate, scale, share = rates.share_of_published(
            run, task.data.batch, published, precision, training.device
        )
        told.append(
            f"{task.title}, {phase}, {precision}: the reference's forward and backward reach {rate:.2f}/s, {100 * share:.0f} % "
            f"of the published {published:g}/s times {scale:.2f}, this machine's matrix products over theirs"
        )
        if not share >= rates.LEAST_SHARE:
            release(training)
            raise Refused(f"{told[-1]}; {100 * rates.LEAST_SHARE:.0f} % is the least, so nothing was timed")
    release(training)
    return told


def _forward_backward(reference: ReferenceTraining, inputs: Inputs, phase: BenchPhase) -> Callable[[], None]:
    if phase == "embedding":
        return lambda: (reference.embed(inputs), None)[1]
    return lambda: reference.forward_backward(inputs, phase)


def reference_inputs(task: Task, training: StageTraining, phase: BenchPhase, num: int) -> list[Inputs]:
    """Return a phase's first batches as the reference takes them."""
    if phase == "embedding":
        return list(whole_batches(training, num * task.data.batch, task.data.batch))
    raws = raw_batches(training, phase, num)
    return [for_reference(training, rows_of(training, raw, phase)) for raw in raws]


@dataclass(kw_only=True)
class Bench:
    """All sides of one kind of data in one precision."""

    task: Task
    precision: str
    trainings: dict[str, StageTraining] = field(default_factory=dict)
    reference: ReferenceTraining | None = None
    resident: dict[str, int] = field(default_factory=dict)  # bytes on a GPU, by side

    def build(self) -> None:
        """Make a stage for every side of ours, and the reference with the same weights."""
        names = [OURS, PLAIN, *([COMPILED] if self.task.compiled else [])]
        for name in names:
            before = _allocated()
            self.trainings[name] = make_training(
                self.task.data,
                self.task.kind,
                vocab=self.task.vocab,
                precision=self.precision,
                plain=name != OURS,
            )
            self.resident[name] = _allocated() - before
        if COMPILED in self.trainings:
            compile_blocks(self.trainings[COMPILED].engine.engine.module, self.task.kind)
        before = _allocated()
        self.reference = make_reference(self.trainings[OURS], bf16=self.precision == "bf16")
        self.resident[REFERENCE] = _allocated() - before

    def time(self, phase: BenchPhase, peak: float | None, advance: Callable[[], Any]) -> list[dict[str, Any]]:
        """Time a phase on all sides; return the table's rows."""
        ours = self.trainings[OURS]
        sides = self._embedding_sides() if phase == "embedding" else self._training_sides(phase)
        for side in sides:
            if side.name == PLAIN:
                prove_plain(side)
        for side in sides:
            before = _allocated()
            warm_up(side, ours.device, times=2)
            self.resident[side.name] += _allocated() - before
            side.resident_bytes = self.resident[side.name]
        measure(sides, ours.device, self.task.rounds, advance)
        flops, steps = self._flops(phase), self.task.steps
        if phase == "embedding":
            steps = self.task.num_embedded // self.task.data.batch
        about = {
            "kind": self.task.kind,
            "phase": phase,
            "vocab": ours.shape.vocab,
            "precision": self.precision,
        }
        return [{**about, **summary(side, sides, steps=steps, flops=flops, peak=peak)} for side in sides]

    def _training_sides(self, phase: Phase) -> list[Side]:
        task, ours = self.task, self.trainings[OURS]
        raws = raw_batches(ours, phase, task.steps)
        inputs = [for_reference(ours, rows_of(ours, raw, phase)) for raw in raws]
        sides = [training_side(name, one, raws, task.data.batch) for name, one in self.trainings.items()]
        if task.end_to_end:
            sides.insert(1, shards_side(ours, phase, task.steps, task.data.batch))
        assert self.reference is not None
        return [*sides, reference_side(self.reference, inputs, phase, task.data.batch)]

    def _embedding_sides(self) -> list[Side]:
        task, ours = self.task, self.trainings[OURS]
        inputs = whole_batches(ours, task.num_embedded, task.data.batch)
        work = EmbeddingWork.of(ours.sets[CURRENT], task.num_embedded, task.data.batch, ours.device)
        sides = []
        for name in self.trainings:
            encoder = embedding_encoder(ours, bf16=self.precision == "bf16")
            if name == COMPILED:
                compile_blocks(encoder, task.kind)
            sides.append(embedding_side(name, encoder, work))
            if name == OURS and task.end_to_end:
                sides.append(embedding_side(name, encoder, work, shards=True))
        assert self.reference is not None
        return [*sides, reference_embedding_side(self.reference, inputs, task.data.batch)]

    def _flops(self, phase: BenchPhase) -> float:
        """Return the useful operations of a window."""
        ours, task = self.trainings[OURS], self.task
        found = 0.0
        if phase != "embedding":
            for raw in raw_batches(ours, phase, task.steps):
                work = rates.work_of(rows_of(ours, raw, phase), ours.shape, phase)
                found += rates.useful_flops(work, ours.settings.model, phase)
            return found
        return embedding_flops(task, ours)

    def close(self) -> None:
        """Give everything back."""
        for training in self.trainings.values():
            release(training)
        self.trainings.clear()
        self.reference = None
        gc.collect()


def embedding_flops(task: Task, training: StageTraining) -> float:
    """Return the useful operations of a window of embedding: real tokens, all patches."""
    if task.kind != "text":
        (raw,) = raw_batches(training, "pretext", 1)
        rows = rows_of(training, raw, "pretext")
        assert isinstance(rows, ImageRows)
        work = rates.work_of(rows, training.shape, "embedding")
        batches = task.num_embedded / task.data.batch
        return batches * rates.useful_flops(work, training.settings.model, "embedding")
    lengths = [
        length
        for inputs in whole_batches(training, task.num_embedded, task.data.batch)
        for length in inputs.valid_BL.sum(1).tolist()  # type: ignore[union-attr]
    ]
    work = rates.Work(tokens=sum(lengths), pairs=sum(length**2 for length in lengths))
    return rates.useful_flops(work, training.settings.model, "embedding")


def release(training: StageTraining) -> None:
    """Give back what a stage holds."""
    training.engine.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch._dynamo.reset()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
