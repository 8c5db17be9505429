"""The sides of the step bench: each goes over the same batches in its own way, a window at a time.

Shape suffixes: B samples.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.bench.step_inputs import only
from mnemos.bench.step_plain import KernelRan, OurOperations, plain_definitions
from mnemos.bench.step_reference import Inputs
from mnemos.bench.step_reference_training import ReferenceTraining
from mnemos.engine.encoder import Encoder
from mnemos.engine.preparing import Phase, TextBatch
from mnemos.engine.rehearsal.embedding_batches import Batch, Batches, PackTexts, features, on_cores
from mnemos.engine.stage_training import StageTraining
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import RawBatch, read_batch, stream

OURS, PLAIN, COMPILED, REFERENCE = "ours", "no kernels", "compiled", "reference"


@dataclass(kw_only=True)
class Side:
    """One way to go over a row's batches.

    Attributes:
        name: in the table.
        run: goes over all batches of a window once.
        samples: of a window.
        mode: "device" where the batches lie ready on the device, "shards" where reading them is part of it.
        context: what holds while it runs.
        resident_bytes: what it keeps on a GPU between its windows.
        probe: does in this thread what a window does, so that its operations can be seen; None: `run` does.
    """

    name: str
    run: Callable[[], None]
    samples: int
    mode: str = "device"
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    resident_bytes: int = 0
    probe: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def training_side(
    name: str, training: StageTraining, raws: Sequence[RawBatch | TextBatch], batch: int
) -> Side:
    """Return the engine's own update on batches that lie ready."""

    def run() -> None:
        for raw in raws:
            training.train_step(raw)

    context = plain_definitions if name in (PLAIN, COMPILED) else nullcontext
    return Side(name=name, run=run, samples=batch * len(raws), context=context)


def shards_side(training: StageTraining, phase: Phase, num: int, batch: int) -> Side:
    """Return the engine's own update with reading: tar shards through `StageTraining.batches`."""
    narrowed = only(training, phase, num)

    def run() -> None:
        whole, training.schedule = training.schedule, narrowed  # type: ignore[assignment]
        try:
            for raw in training.batches(0):
                training.train_step(raw)
        finally:
            training.schedule = whole

    return Side(name=OURS, run=run, samples=batch * num, mode="shards")


def reference_side(reference: ReferenceTraining, inputs: Sequence[Inputs], phase: Phase, batch: int) -> Side:
    """Return the reference's update on the same batches."""

    def run() -> None:
        for one in inputs:
            reference.train_step(one, phase)

    return Side(name=REFERENCE, run=run, samples=batch * len(inputs))


@dataclass(frozen=True, kw_only=True)
class EmbeddingWork:
    """The first samples of a split, as the engine embeds them; on a CPU every core takes batches of its own.

    Attributes:
        shards: the split.
        num: samples embedded.
        batches: how the engine cuts them up.
        device: to compute on.
    """

    shards: ShardSet
    num: int
    batches: Batches
    device: torch.device

    @classmethod
    def of(cls, shards: ShardSet, num: int, batch: int, device: torch.device) -> "EmbeddingWork":
        """Return the work on `num` samples, images in batches of `batch`, texts packed as the engine packs them."""
        if shards.manifest.kind != "text":
            batches = Batches(num_samples=num, size=batch)
        else:
            longest = shards.manifest.shape[0]
            # a batch for every core; a row of texts holds what the engine's do, or all there is
            size = max(1, num // (torch.get_num_threads() if device.type == "cpu" else 1))
            tokens = min(max(Batches.MOST_TOKENS[device.type], longest), size * longest)
            batches = Batches(num_samples=num, size=size, text_tokens=tokens, longest=longest)
        return cls(shards=shards, num=num, batches=batches, device=device)

    def ready(self) -> list[Batch]:
        """Return the batches, read and packed."""
        pack = PackTexts(text_tokens=self.batches.text_tokens, longest=self.batches.longest)
        requests = self.batches.requests(np.arange(len(self.batches)))
        raws = [read_batch([self.shards], request) for request in requests]
        if self.shards.manifest.kind == "text":
            return [pack(raw).to(self.device) for raw in raws]
        return [raw.to(self.device) for raw in raws]

    def from_shards(self) -> Any:
        """Return the batches as the engine's embedding reads them."""
        text = self.shards.manifest.kind == "text"
        pack = PackTexts(text_tokens=self.batches.text_tokens, longest=self.batches.longest)
        plan = partial(self.batches.requests, np.arange(len(self.batches)))
        on_gpu = self.device.type == "cuda"
        return stream(
            [self.shards], plan, ready=pack if text else None, workers=4 if on_gpu else 0, pin=on_gpu
        )

    @torch.no_grad()
    def embed(self, encoder: Encoder, source: Any) -> Tensor:
        """Return fp32 features [num, D] on the device."""
        kind: Any = self.shards.manifest.kind
        compute = partial(features, encoder, kind, device=self.device)
        if self.device.type == "cpu":
            found = [rows for _, rows in on_cores(compute, source)]
        else:
            found = [compute(batch) for batch in source]
        return torch.cat(found)[: self.num]


def embedding_encoder(training: StageTraining, *, bf16: bool) -> Encoder:
    """Return the stage's encoder as embedding takes it: eval mode, the type that is computed in."""
    encoder = Encoder(training.shape, attention=training.settings.training.attention)
    prefix = "encoder."
    weights = training.engine.full_weights()
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    encoder.load_state_dict(own)
    encoder = encoder.to(training.device).eval().requires_grad_(False)
    return copy.deepcopy(encoder).to(torch.bfloat16) if bf16 else encoder


def embedding_side(name: str, encoder: Encoder, work: EmbeddingWork, *, shards: bool = False) -> Side:
    """Return the engine's pass over samples that lie ready, or with reading."""
    batches = [] if shards else work.ready()

    def run() -> None:
        if not shards:
            work.embed(encoder, batches)
            return
        with closing(work.from_shards()) as source:
            work.embed(encoder, source)

    context = plain_definitions if name in (PLAIN, COMPILED) else nullcontext
    mode = "shards" if shards else "device"
    kind: Any = work.shards.manifest.kind
    side = Side(name=name, run=run, samples=work.num, mode=mode, context=context)
    side.probe = partial(features, encoder, kind, batches[0], work.device) if batches else None
    return side


def reference_embedding_side(reference: ReferenceTraining, inputs: Sequence[Inputs], batch: int) -> Side:
    """Return the reference's pass over the same samples, batch by batch."""

    def run() -> None:
        for one in inputs:
            reference.embed(one)

    return Side(name=REFERENCE, run=run, samples=batch * len(inputs))


def compile_blocks(module: torch.nn.Module, kind: str) -> None:
    """Compile the blocks of encoder and decoder in place; texts have another length every batch."""
    for name, child in module.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            child.compile(dynamic=kind == "text")


def prove_plain(side: Side) -> None:
    """Run a side once and see that none of our operations is in it.

    Raises:
        KernelRan: one is.
    """
    watch = OurOperations()
    with side.context(), watch:
        (side.probe or side.run)()
    if watch.seen:
        raise KernelRan(
            f"{side.name}: {', '.join(sorted(watch.seen))} ran; give step_plain.PLAIN its definition"
        )
