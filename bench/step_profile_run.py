"""Make a step ready outside a run, and record some of them: the engine's own objects, with ranges laid around them.

The ranges name the parts of a step in the trace; they are laid by module hooks and around methods of these very objects
and taken off again. Nothing in the engine knows of them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from mnemos.bench.step_inputs import OneSet
from mnemos.bench.step_profile_roles import RANGE, STEPS
from mnemos.bench.step_profile_work import Load, load_of
from mnemos.engine import dist, weights
from mnemos.engine.curriculum import Plan, Stage
from mnemos.engine.encoder import Encoder
from mnemos.engine.optimizer import active_parts, part_of
from mnemos.engine.parallel import computes_in_bf16
from mnemos.engine.preparing import TextBatch
from mnemos.engine.rehearsal.embedding_batches import Batches, PackTexts, features
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_model import encoder_shape
from mnemos.engine.stage_training import StageTraining
from mnemos.sharding.errors import UserError
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import stream

LEARNING_RATE = 1e-4
WARM_UP = 2  # steps before anything is measured: memory is allocated, kernels are compiled


@dataclass(frozen=True, kw_only=True)
class LonePlan(Plan):
    """A plan whose stage starts with fresh weights, but may rehearse: its own data stand for a buffer."""

    rehearses: bool

    def rehearsed(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the stage itself, where one is to be rehearsed."""
        return (stage,) if self.rehearses else ()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is profiled.

    Attributes:
        do: one step on a batch.
        batches: one for every recorded step, and one before; read already.
        load: what a mean step computes on.
        parameters: values that a step's optimiser moves.
        bf16: computed in bf16, else in fp32.
        modules: modules whose forward is a range, and its name.
        methods: objects and methods that are a range, and its name.
    """

    do: Callable[[Any], object]
    batches: Sequence[Any]
    load: Load
    parameters: int
    bf16: bool
    modules: Sequence[tuple[nn.Module, str]]
    methods: Sequence[tuple[object, str, str]] = ()


def make_training(plan: Plan, phase: str, steps: int) -> Subject:
    """Return the updates of a plan's last stage in one phase, on its own data.

    Args:
        plan: checked; its last stage has data in a local folder.
        phase: pretext or rehearsal.
        steps: to be recorded.
    """
    asked = plan.stages[-1]
    stage = replace(asked, number=1)  # the first: its weights are fresh
    assert isinstance(stage.data, Path), "a bench reads local folders"
    rehearses = phase == "rehearsal"
    if rehearses:
        stage.buffer.parent.mkdir(parents=True)
        stage.buffer.symlink_to(stage.data.resolve())
    known = {field.name: getattr(plan, field.name) for field in fields(Plan)}
    training = StageTraining(LonePlan(**known, rehearses=rehearses), stage)
    training.engine.optimizer.set_rate(LEARNING_RATE)
    schedule = OneSet(training.schedule, CURRENT + rehearses, 1 + steps)
    training.schedule = schedule  # type: ignore[assignment]
    batches = [_kept(batch) for batch in training.batches(0)]
    if len(batches) <= steps:
        raise UserError(f"--steps {steps}: the schedule holds {len(batches) - 1} such steps; ask for fewer")
    wrapped = training.engine.engine  # DeepSpeed's
    model = wrapped.module
    active = active_parts(asked.manifest.kind, phase)
    count = sum(one.numel() for name, one in _full_parameters(model) if part_of(name) in active)
    methods: list[tuple[object, str, str]] = [
        *((preparer, "images", "pixels") for preparer in training.preparers),
        (wrapped, "backward", "backward"),
        (wrapped, "step", "update"),
    ]
    if training.teacher is not None:
        methods += [(training.teacher, name, "teacher") for name in ("forward_patches", "forward_text")]
    return Subject(
        do=training.train_step,
        batches=batches,
        load=load_of(asked, training.shape, plan.settings, [_rows(batch) for batch in batches[1:]]),
        parameters=count,
        bf16=training.bf16,
        modules=[(wrapped, "deepspeed"), (model, "model"), *_parts(model)],
        methods=methods,
    )


def make_embedding(plan: Plan, batch: int, steps: int) -> Subject:
    """Return the batches of an embedding pass over the training split of a plan's last stage."""
    stage, device = plan.stages[-1], dist.device()
    assert stage.data is not None
    shards, bf16 = (
        ShardSet(stage.data, "train", plan.store),
        computes_in_bf16(plan.settings.training.precision),
    )
    shape, kind = encoder_shape(plan), stage.manifest.kind
    torch.manual_seed(0)
    encoder = Encoder(shape, attention=plan.settings.training.attention)
    encoder = encoder.to(device, torch.bfloat16 if bf16 else torch.float32).eval().requires_grad_(False)
    cut = Batches.of(shards, device)
    # As if the set were larger than it is: a batch that is past its end has its last sample.
    tokens = min(cut.MOST_TOKENS[device.type], batch * cut.longest)
    cut = replace(cut, size=batch, text_tokens=max(tokens, cut.longest))
    ready = PackTexts(text_tokens=cut.text_tokens, longest=cut.longest) if kind == "text" else None
    source = stream(
        [shards], partial(cut.requests, np.arange(1 + steps) % len(cut)), ready=ready, workers=0, pin=False
    )
    batches = [_kept(one) for one in source]

    def do(one: Any) -> Tensor:
        with torch.no_grad(), record_function(f"{RANGE}model"):
            return features(encoder, kind, one, device)

    load = load_of(stage, shape, plan.settings, batches[1:], unmasked=True)
    return Subject(
        do=do,
        batches=batches,
        load=load,
        parameters=0,
        bf16=bf16,
        modules=_parts(encoder),
        methods=[(weights, "all_patches", "pixels")],
    )


def _full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and parameters; under ZeRO 3 the whole ones' shapes."""
    for name, parameter in model.named_parameters():
        yield name, torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")


def _kept(batch: Any) -> Any:
    """Return a batch with memory of its own: what readers fill is used again."""
    return batch if not hasattr(batch, "data") else replace(batch, data=batch.data.clone())


def _rows(batch: Any) -> Any:
    return batch.rows if isinstance(batch, TextBatch) else batch


def _parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules that name where a matrix product belongs; what is in none is the encoder's."""
    found = []
    for name, module in model.named_modules():
        parts = name.removeprefix("encoder.").split(".")
        if len(parts) == 2 and parts[0] == "tokenizers":
            found.append((module, "tokenizer"))
        elif name == "image_decoder":
            found.append((module, "decoder"))
        elif name == "word_head" or (len(parts) == 3 and parts[:2] == ["image_decoder", "heads"]):
            found.append((module, "head"))
    return found


@contextlib.contextmanager
def ranges(subject: Subject) -> Iterator[None]:
    """Lay the ranges of a subject for as long as this lasts."""
    with contextlib.ExitStack() as stack:
        for module, name in subject.modules:
            open_ones: list[Any] = []

            def enter(*_: object, name: str = name, open_ones: list[Any] = open_ones) -> None:
                open_ones.append(record_function(f"{RANGE}{name}"))
                open_ones[-1].__enter__()

            def leave(*_: object, open_ones: list[Any] = open_ones) -> None:
                if open_ones:  # an error before its own beginning
                    open_ones.pop().__exit__(None, None, None)

            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        for owner, method, name in subject.methods:
            ranged = _ranged(getattr(owner, method), f"{RANGE}{name}")
            stack.enter_context(patch.object(owner, method, ranged))
        yield


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def inside(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return inside


def record(subject: Subject, file: Path) -> None:
    """Do the steps one after the other under the profiler, and write its trace.

    One step goes before, recorded but outside the range: the first one under a profiler sets it up.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    first, *others = subject.batches
    with ranges(subject), profile(activities=activities, acc_events=True) as recorded:
        subject.do(first)
        wait()
        with record_function(STEPS):
            for batch in others:
                subject.do(batch)
            wait()
    recorded.export_chrome_trace(str(file))


def wait() -> None:
    """Wait for the device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
