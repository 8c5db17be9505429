"""Train one stage: the pretext task on its own modality, distillation on the buffers of earlier ones."""

import json
import math
import time
from collections.abc import Iterator
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
from mnemos.engine.objectives import Pretrainer
from mnemos.engine.optimizer import rate_table
from mnemos.engine.parallel import Engine, computes_in_bf16
from mnemos.engine.preparing import Preparer, TextBatch, TextsReady
from mnemos.engine.progress import Progress, say
from mnemos.engine.run_directory import write_atomically
from mnemos.engine.showing import show_predictions
from mnemos.engine.slots import CURRENT, Schedule, rank_rows
from mnemos.engine.stage_model import encoder_shape, make_model, text_tokenizer
from mnemos.engine.stopping import BadNumbers, StopFlag, Stopped
from mnemos.engine.training_step import TrainingStep, phase_of
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
        self.known_left_out = 0  # updates, told already
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
        self.step = TrainingStep(
            self.engine,
            self.teacher,
            self.settings,
            self.shape,
            [kept.manifest for kept in self.sets],
            self.preparers,
            micro=self.micro,
            accumulate=self.accumulate,
            dtype=self.dtype,
        )
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
        self.step.release()
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
        rates = rate_table(self.schedule.num_steps, peak, training.warmup)
        self.engine.optimizer.use_rates(rates.to(self.device))
        losses = torch.zeros(training.log_every, device=self.device)  # of the updates since the last reading
        pending: list[dict[str, Any]] = []
        since = time.monotonic()
        latest: dict[str, float] = {}
        for raw in self.batches(step):
            self.engine.optimizer.set_update(raw.step)
            losses[len(pending)] = self.train_step(raw)
            step = raw.step + 1
            pending.append(
                {
                    "step": step,
                    "modality": self.sets[raw.member].manifest.name,
                    "phase": phase_of(raw.member),
                    "lr": float(rates[raw.step]),
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
        """Do one update on this rank's part of a global batch; return its part of the loss (device scalar)."""
        return self.step(raw)

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
            phases=[phase_of(member) for member in range(len(self.sets))],
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
        left_out = self.engine.guard.skipped[None] / dist.world_size()  # the same on every rank
        read = dist.total(torch.cat([losses[: len(pending)], flags, left_out])).tolist()
        *values, stopped, num_bad, num_left_out = read
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
        self._tell_left_out(round(num_left_out), pending)
        return bool(stopped > 0)

    def _tell_left_out(self, number: int, pending: list[dict[str, Any]]) -> None:
        """Say how many updates were left out so far, where there are more of them now.

        Raises:
            BadNumbers: all since the last reading were.
        """
        more, self.known_left_out = number - self.known_left_out, number
        what = f"stage {self.stage.name}: {more} of the last {len(pending)} updates had a gradient that is not finite"
        if more == len(pending):
            raise BadNumbers(f"{what}; lower training.base_lr, or compute with --set training.precision=fp32")
        if more and dist.is_main():
            say(f"{what} and were left out")

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
