"""Train one stage: the pretext task on its own modality, distillation on the buffers of earlier ones."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnemos.engine import dist
from mnemos.engine.checkpoints import remove_checkpoints, restore_checkpoint, save_checkpoint
from mnemos.engine.curriculum import Plan, Stage
from mnemos.engine.encoder import Encoder
from mnemos.engine.estimates import choose_micro_batch, free_memory
from mnemos.engine.metrics_log import MetricsLog
from mnemos.engine.objectives import Pretrainer, encode, local_count, visible_patches
from mnemos.engine.optimizer import active_parts
from mnemos.engine.parallel import Engine, computes_in_bf16
from mnemos.engine.preparing import Phase, Preparer, Rows, TextBatch, TextRows, TextsReady
from mnemos.engine.progress import Progress
from mnemos.engine.run_directory import write_atomically
from mnemos.engine.showing import show_predictions
from mnemos.engine.slots import CURRENT, Schedule, learning_rate, micro_batches, rank_rows
from mnemos.engine.stage_model import encoder_shape, make_model, text_tokenizer
from mnemos.engine.stopping import BadNumbers, StopFlag, Stopped
from mnemos.engine.validation import Validation
from mnemos.engine.weights import modality_record, save_encoder
from mnemos.sharding.bad_samples import BadSamples
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import RawBatch, Request, stream
from mnemos.sharding.tokenizer import load_tokenizer, starts_word

CHECKPOINTS = "checkpoints"
SKIPPED = "skipped.jsonl"


class StageTraining:
    """One stage under way.

    Args:
        plan: of this call.
        stage: to be trained.
    """

    def __init__(self, plan: Plan, stage: Stage) -> None:
        self.plan, self.stage, self.settings = plan, stage, plan.settings
        self.device = dist.device()
        self.bf16 = computes_in_bf16(self.settings.training.precision)
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        assert stage.data is not None
        rehearsed = plan.rehearsed(stage)
        self.sets = [
            ShardSet(stage.data, "train", plan.store),
            *(ShardSet(earlier.buffer, "train") for earlier in rehearsed),
        ]
        self.schedule = plan.schedule(
            stage,
            tuple(len(kept) for kept in self.sets[1:]),
            tuple(
                tuple(shard.samples for shard in kept.manifest.splits["train"].shards) for kept in self.sets
            ),
        )
        self.bad = BadSamples(self.settings.data.max_bad)
        self.known_bad = 0  # of all ranks, told already
        self.shape = encoder_shape(plan)
        model = make_model(plan, stage, self.shape)
        self.teacher = self._make_teacher(model.encoder) if rehearsed else None
        share = self.settings.training.batch // dist.world_size()
        self.micro = choose_micro_batch(
            plan,
            stage,
            self.shape,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            bf16=self.bf16,
            world=dist.world_size(),
            free_bytes=dist.least(free_memory(self.device)),
        )
        self.accumulate = share // self.micro
        self.engine = Engine(
            model,
            self.settings,
            bf16=self.bf16,
            micro_batch=self.micro,
            accumulate=self.accumulate,
            user=plan.deepspeed,
        )
        starts_word_V = self._starts_word()
        self.preparers = [
            Preparer(self.settings, self.shape, starts_word_V, stream=f"{stage.name}/{kept.manifest.name}")
            for kept in self.sets
        ]
        self.validation = Validation(
            ShardSet(stage.data, "val", plan.store),
            self.sets[CURRENT],
            Preparer(self.settings, self.shape, starts_word_V, stream=f"{stage.name}/validation"),
            self.shape,
            device=self.device,
            dtype=self.dtype,
            on_skip=self.bad.note,
        )

    def run(self) -> dict[str, Any]:
        """Train to the stage's end, write the encoder and return what the stage showed; collective.

        Raises:
            Stopped: a signal came; a checkpoint was written.
            BadNumbers: a loss is not finite.
        """
        begun = time.monotonic()
        step = restore_checkpoint(self.stage.directory / CHECKPOINTS, self.engine, self.taken)
        log = (
            MetricsLog(self.stage.directory, stage=self.stage.name, resume_at=step + 1)
            if dist.is_main()
            else None
        )
        title = f"{self.stage.number}/{len(self.plan.stages)} {self.stage.name}"
        try:
            with (
                StopFlag() as stop,
                Progress(title, self.schedule.num_steps, done=step, shown=dist.is_main()) as progress,
            ):
                shown = self._train(step, stop, progress, log)
        finally:
            if log is not None:
                log.close()
        self._save()
        self.engine.release()
        return {**shown, "seconds": round(time.monotonic() - begun, 1)}

    def taken(self, step: int) -> dict[str, int]:
        """Return the place in the data after an update: the samples taken so far, by modality."""
        return {
            kept.manifest.name: self.schedule.steps_of(member, step) * self.schedule.batch
            for member, kept in enumerate(self.sets)
        }

    def _train(self, step: int, stop: StopFlag, progress: Progress, log: MetricsLog | None) -> dict[str, Any]:
        training = self.settings.training
        peak = training.base_lr * training.batch / 256
        losses = torch.zeros(training.log_every, device=self.device)  # of the updates since the last reading
        pending: list[dict[str, Any]] = []
        since = time.monotonic()
        latest: dict[str, float] = {}
        for raw in self.batches(step):
            rate = learning_rate(raw.step, self.schedule.num_steps, peak, training.warmup)
            self.engine.optimizer.set_rate(rate)
            losses[len(pending)] = self.train_step(raw)
            step = raw.step + 1
            pending.append(
                {
                    "step": step,
                    "modality": self.sets[raw.member].manifest.name,
                    "phase": _phase(raw.member),
                    "lr": rate,
                }
            )
            last = step == self.schedule.num_steps
            if len(pending) == training.log_every or last:
                pace = len(pending) * training.batch / (time.monotonic() - since)
                stopped = self._report(losses, pending, stop, log, pace)
                progress.advance(len(pending), **_facts(pending, pace, latest))
                pending, since = [], time.monotonic()
                if stopped or (step % training.checkpoint_every < training.log_every and not last):
                    save_checkpoint(self.stage.directory / CHECKPOINTS, self.engine, step, self.taken(step))
                if stopped:
                    raise Stopped
            if step % training.validate_every == 0 and not last:
                latest = self._validate(step, log)
        latest = self._validate(step, log)  # also where a run was stopped just before it
        return {
            "steps": self.schedule.num_steps,
            "pretext_steps": self.schedule.steps_of(CURRENT),
            "samples": len(self.sets[CURRENT]),
            "validation": latest,
        }

    def _validate(self, step: int, log: MetricsLog | None) -> dict[str, float]:
        measured = self.validation.measure(self.engine)
        if log is not None:
            name = self.stage.manifest.name
            log.write([{"step": step, "modality": name, "phase": "validation", **measured}])
        return measured

    def train_step(self, raw: RawBatch | TextBatch) -> Tensor:
        """Do one update on this rank's part of a global batch; return its part of the loss (device scalar).

        The parts of all ranks add up to the mean over the global batch, whatever the micro-batches.
        """
        raw = raw.to(self.device)
        manifest, phase = self.sets[raw.member].manifest, _phase(raw.member)
        rows: Rows
        if isinstance(raw, TextBatch):
            rows = raw.rows
        else:
            rows = self.preparers[raw.member].images(manifest, raw, phase=phase, training=True)
        terms, world = local_count(rows, phase), dist.world_size()
        if isinstance(rows, TextRows):  # every rank has as many as its texts have
            factor = world / dist.total(torch.full((), float(terms), device=self.device)).clamp_min(1.0)
        else:
            factor = torch.full((), 1.0 / terms, device=self.device)
        self.engine.optimizer.active = active_parts(manifest.kind, phase)
        weight = self.settings.rehearsal.weight if phase == "rehearsal" else 1.0
        done = torch.zeros((), device=self.device)
        for start, stop in micro_batches(rows.num_samples, self.micro):
            part = rows.rows(start, stop)
            patches = None if isinstance(part, TextRows) else visible_patches(self.shape, part, self.dtype)
            target = self._teach(part, patches) if phase == "rehearsal" else None
            # DeepSpeed averages over the ranks; the factor makes up for it
            loss = self.engine(part, patches, target, factor)
            done += loss.detach() / world
            self.engine.update(loss * weight)
        return done

    @torch.no_grad()
    def _teach(self, rows: Rows, patches_BKP: Tensor | None) -> Tensor:
        """Return the teacher's features of the same visible patches, without DropPath."""
        assert self.teacher is not None
        return encode(self.teacher, replace(rows, keep=None), patches_BKP)

    def _make_teacher(self, encoder: Encoder) -> Encoder:
        teacher = Encoder(self.shape, attention=self.settings.training.attention)
        teacher.load_state_dict(encoder.state_dict())
        return teacher.to(self.device, self.dtype).eval().requires_grad_(False)

    def batches(self, step: int) -> Iterator[RawBatch | TextBatch]:
        """Yield this rank's part of every global batch from update `step` on."""
        workers = self.settings.data.workers
        on_gpu = self.device.type == "cuda"
        if workers < 0:
            workers = 4 if on_gpu else 0
        plan = partial(_requests, self.schedule, step, dist.rank(), dist.world_size())
        ready = TextsReady(
            preparers=self.preparers,
            kinds=[kept.manifest.kind for kept in self.sets],
            phases=[_phase(member) for member in range(len(self.sets))],
        )
        return stream(self.sets, plan, ready=ready, on_skip=self.bad.note, workers=workers, pin=on_gpu)

    def _starts_word(self) -> Tensor | None:
        file = text_tokenizer(self.plan)
        return None if file is None else torch.from_numpy(starts_word(load_tokenizer(file)))

    def _report(
        self,
        losses: Tensor,
        pending: list[dict[str, Any]],
        stop: StopFlag,
        log: MetricsLog | None,
        pace: float,
    ) -> bool:
        """Read the losses since the last time, write them, and tell whether any rank was asked to stop."""
        flags = torch.tensor([float(stop.raised), float(len(self.bad))], device=self.device)
        *values, stopped, num_bad = dist.total(torch.cat([losses[: len(pending)], flags])).tolist()
        for record, value in zip(pending, values, strict=True):
            record |= {"loss": value, "samples_per_s": round(pace, 2)}
        if log is not None:
            log.write(pending)
        for record in pending:
            if not math.isfinite(record["loss"]):
                raise BadNumbers(
                    f"stage {self.stage.name}: the loss of update {record['step']} ({record['modality']}, "
                    f"{record['phase']}) is {record['loss']}; lower training.base_lr, or compute with "
                    "--set training.precision=fp32"
                )
        if num_bad > self.known_bad:
            self.known_bad = int(num_bad)
            self._tell_bad()
        return bool(stopped > 0)

    def _tell_bad(self) -> None:
        """Write the samples any rank has skipped, each once, with shard and key; collective.

        Raises:
            DataError: together the ranks have skipped more of a set than may be broken.
        """
        reasons = dist.join(self.bad.reasons)
        if dist.is_main():
            lines = "".join(json.dumps({"skipped": reason}) + "\n" for reason in sorted(reasons.values()))
            write_atomically(self.stage.directory / SKIPPED, lines)
        self.bad.check(reasons, self.sets)

    def _save(self) -> None:
        """Write the encoder and the pictures of the finished stage."""
        weights = self.engine.full_weights()
        if dist.is_main():
            prefix = "encoder."
            members = (*self.plan.earlier(self.stage), self.stage)
            model = Pretrainer(Encoder(self.shape), self.settings)
            model.load_state_dict(weights)
            show_predictions(self.stage, model.eval(), self.validation, text_tokenizer(self.plan))
            save_encoder(
                self.stage.directory,
                {
                    name.removeprefix(prefix): value
                    for name, value in weights.items()
                    if name.startswith(prefix)
                },
                self.shape,
                stage=self.stage.name,
                modalities={member.name: modality_record(member.manifest) for member in members},
                tokenizer=text_tokenizer(self.plan),
            )
            remove_checkpoints(self.stage.directory / CHECKPOINTS)
        dist.barrier()


def _phase(member: int) -> Phase:
    return "pretext" if member == CURRENT else "rehearsal"


def _requests(schedule: Schedule, step: int, rank: int, world_size: int) -> Iterator[Request]:
    """Yield one rank's part of every global batch from update `step` on."""
    rows = rank_rows(schedule.batch, rank, world_size)
    for slot in schedule.slots(step):
        yield Request(
            step=slot.step, member=slot.member, samples=slot.samples[rows], places=slot.places()[rows]
        )


def _facts(pending: list[dict[str, Any]], pace: float, latest: dict[str, float]) -> dict[str, str]:
    """Return what the progress bar shows."""
    own = [record["loss"] for record in pending if record["phase"] == "pretext"]
    facts = {"loss": f"{sum(own) / len(own):.3f}"} if own else {}
    if latest:
        facts["val"] = f"{latest['loss']:.3f}"
    return {**facts, "samples/s": f"{pace:.0f}"}
