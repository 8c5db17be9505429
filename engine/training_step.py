"""One update: a batch made ready, forward and backward on this rank's part of it, the optimiser.

Where shapes are fixed a GPU takes forward and backward as one CUDA graph (`mnemos.engine.step_graph`); everything in them
is a function of the batch's tensors, places included, so that a graph computes what its kernels one by one would.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mnemos.engine import dist
from mnemos.engine.encoder import Encoder, EncoderShape
from mnemos.engine.graph_recorder import CudaRecorder, refusal
from mnemos.engine.objectives import encode, local_count, visible_patches
from mnemos.engine.optimizer import active_parts
from mnemos.engine.parallel import Engine
from mnemos.engine.preparing import Phase, Preparer, Rows, TextBatch, TextRows
from mnemos.engine.progress import say
from mnemos.engine.settings import Settings
from mnemos.engine.slots import CURRENT, micro_batches
from mnemos.engine.step_graph import Shared, StepGraph
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import Manifest
from mnemos.sharding.stream import RawBatch


def phase_of(member: int) -> Phase:
    """Return what a stage does with one of its sets: the current one comes first, buffers are rehearsed."""
    return "pretext" if member == CURRENT else "rehearsal"


class TrainingStep:
    """The updates of one stage.

    Args:
        engine: the model under DeepSpeed.
        teacher: the encoder of the stage before, in the type computed in; None where nothing is rehearsed.
        settings: of the run.
        shape: of the encoder.
        manifests: of the stage's sets, the current one first.
        preparers: of the same sets.
        micro: samples of one forward pass on this rank.
        accumulate: forward passes of one update.
        dtype: computed in.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: Encoder | None,
        settings: Settings,
        shape: EncoderShape,
        manifests: Sequence[Manifest],
        preparers: Sequence[Preparer],
        *,
        micro: int,
        accumulate: int,
        dtype: torch.dtype,
    ) -> None:
        self.engine, self.teacher, self.settings, self.shape = engine, teacher, settings, shape
        self.manifests, self.preparers = manifests, preparers
        self.micro, self.dtype = micro, dtype
        self.device = dist.device()
        self.graphs = self._graphs(accumulate)

    def __call__(self, raw: RawBatch | TextBatch) -> Tensor:
        """Do one update on this rank's part of a global batch; return its part of the loss (device scalar).

        The parts of all ranks add up to the mean over the global batch, whatever the micro-batches.
        """
        raw = raw.to(self.device)
        member, phase, world = raw.member, phase_of(raw.member), dist.world_size()
        self.engine.optimizer.active = active_parts(self.manifests[member].kind, phase)
        weight = self._weight(member)
        if not isinstance(raw, TextBatch) and member in self.graphs:
            loss = self.engine.loss_of(self.graphs[member], raw)
            self.engine.update(loss)
            return loss.detach() / (weight * world)
        rows = raw.rows if isinstance(raw, TextBatch) else self._prepare(member, raw)
        factor = self._factor(rows, phase)
        done = torch.zeros((), device=self.device)
        for start, stop in micro_batches(rows.num_samples, self.micro):
            # DeepSpeed averages over the ranks; the factor makes up for it
            loss = self._loss(self.engine, rows.rows(start, stop), phase, factor)
            done += loss.detach() / world
            self.engine.update(loss * weight)
        return done

    def _prepare(self, member: int, raw: RawBatch) -> Rows:
        return self.preparers[member].images(
            self.manifests[member], raw, phase=phase_of(member), training=True
        )

    def _weight(self, member: int) -> float:
        return self.settings.rehearsal.weight if phase_of(member) == "rehearsal" else 1.0

    def _factor(self, rows: Rows, phase: Phase) -> Tensor:
        """Return what makes a sum of this rank's terms its part of the mean over all ranks, times their number."""
        terms = local_count(rows, phase)
        if isinstance(rows, TextRows):  # every rank has as many as its texts have
            total = dist.total(torch.full((), float(terms), device=self.device))
            return dist.world_size() / total.clamp_min(1.0)
        return torch.full((), 1.0 / terms, device=self.device)

    def _loss(self, model: Callable[..., Tensor], rows: Rows, phase: Phase, factor: Tensor) -> Tensor:
        patches = None if isinstance(rows, TextRows) else visible_patches(self.shape, rows, self.dtype)
        target = self._teach(rows, patches) if phase == "rehearsal" else None
        return model(rows, patches, target, factor)

    @torch.no_grad()
    def _teach(self, rows: Rows, patches_BKP: Tensor | None) -> Tensor:
        """Return the teacher's features of the same visible patches, without DropPath."""
        assert self.teacher is not None
        return encode(self.teacher, replace(rows, keep=None), patches_BKP)

    # ---- CUDA graphs
    def _graphs(self, accumulate: int) -> dict[int, StepGraph]:
        """Return a graph for each set whose batches have one shape; none where they cannot be or are not wanted.

        Raises:
            UserError: they are asked for and cannot be.
        """
        asked = self.settings.training.graphs
        why = refusal(
            device=self.device, zero=self.engine.stage, accumulate=accumulate, user=self.engine.user
        )
        if asked == "always" and why:
            raise UserError(f"training.graphs=always: {why}, or set training.graphs=auto")
        if asked == "never" or why:
            return {}
        shared = Shared(CudaRecorder(self.device), dtype=self.dtype, tell=self._tell, agree=_first_of_all)
        module = self.engine.engine.module
        own = module.forward  # without DeepSpeed's hooks, which stay outside of a graph
        return {
            member: StepGraph(
                partial(self._fixed_loss, own, member),
                list(module.parameters()),
                name=f"{manifest.name} {phase_of(member)}",
                shared=shared,
            )
            for member, manifest in enumerate(self.manifests)
            if manifest.kind != "text" and self._weight(member) > 0
        }

    def _fixed_loss(self, model: Callable[..., Tensor], member: int, raw: RawBatch) -> Tensor:
        """Return the weighted loss of a whole batch: a function of its tensors alone."""
        rows, phase = self._prepare(member, raw), phase_of(member)
        return self._loss(model, rows, phase, self._factor(rows, phase) * self._weight(member))

    def _tell(self, sentence: str) -> None:
        if self.settings.training.graphs == "always":
            raise UserError(f"training.graphs=always: {sentence}; set training.graphs=auto")
        if dist.is_main():
            say(sentence)

    def release(self) -> None:
        """Give back what graphs hold; before the engine is released."""
        self.graphs.clear()


def _first_of_all(reason: str) -> str:
    """Return the first reason of all ranks that is not empty; collective."""
    return next(filter(None, dist.join({dist.rank(): reason}).values()), "")
