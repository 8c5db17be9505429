"""What DeepSpeed costs: the engine's update against the same update in a plain loop.

The plain loop has the same model, losses and fused AdamW over the same groups, one tensor a parameter, and in bf16 the
same fp32 master weights, and the same guard of the gradients; it has no DeepSpeed and no flat parameters. What is left between
the two is DeepSpeed's own Python, its hooks on every parameter, its copies of gradients and weights, and what the engine
adds around them, less what flat parameters save.

Measured under ZeRO-1 as a user's configuration asks for it, and under the stage the engine takes by itself on one rank;
at full size, where copies of all gradients and weights count, and at a width of next to nothing with the same number of
parameter tensors, where only what a step costs by tensor is left.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.bench.step_inputs import LEARNING_RATE, Data, make_training, raw_batches
from mnemos.bench.step_rates import quartiles
from mnemos.bench.step_sides import Side, training_side
from mnemos.bench.step_timing import measure, warm_up
from mnemos.engine.gradient_guard import GradientGuard
from mnemos.engine.optimizer import PartAdamW, parameter_groups
from mnemos.engine.settings import Settings
from mnemos.engine.stage_model import make_model
from mnemos.engine.stage_training import StageTraining

LEAST_WIDTH = 8  # that the engine's settings allow
ALLOWED_MS = 3.0
FORCED = {"zero_optimization": {"stage": 1}}  # as a user's own configuration, which the engine obeys


class PlainEngine:
    """What `mnemos.engine.parallel.Engine` does, in a plain loop on one rank.

    Args:
        model: a fresh `Pretrainer`.
        settings: of the run.
        bf16: compute in bf16 with fp32 master weights, else in fp32.
        device: to compute on.
    """

    def __init__(self, model: nn.Module, settings: Settings, *, bf16: bool, device: torch.device) -> None:
        self.bf16, self.model = bf16, model.to(device)
        groups = parameter_groups(self.model, settings.training)
        parameters = [one for group in groups for one in group["params"]]
        self.master = {one: nn.Parameter(one.detach().clone()) if bf16 else one for one in parameters}
        for group in groups:
            group["params"] = [self.master[one] for one in group["params"]]
        if bf16:
            self.model.to(torch.bfloat16)
        self.optimizer = PartAdamW(groups, settings.training)
        self.guard = GradientGuard(self.master, device)
        self.optimizer.found_inf = self.guard.found_inf

    def __call__(self, *inputs: Any) -> Tensor:
        """Run the model's forward."""
        loss: Tensor = self.model(*inputs)
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward one update's loss and step the parts that have gradients."""
        loss.backward()
        self.guard.close_update()
        trained = [one for one in self.master if one.grad is not None]
        if self.bf16:
            masters = [self.master[one] for one in trained]
            for low, high in zip(trained, masters, strict=True):
                assert low.grad is not None
                high.grad = low.grad.float()
        self.optimizer.step()
        if self.bf16:
            with torch.no_grad():
                torch._foreach_copy_(trained, masters)
        for one in trained:
            one.grad = self.master[one].grad = None


def plain_training(training: StageTraining) -> StageTraining:
    """Put a plain loop in the place of a stage's DeepSpeed engine, which is given back."""
    training.engine.release()
    model = make_model(training.plan, training.stage, training.shape)
    plain = PlainEngine(model, training.settings, bf16=training.bf16, device=training.device)
    plain.optimizer.set_rate(LEARNING_RATE)
    training.engine = training.step.engine = plain  # type: ignore[assignment]
    return training


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """How much longer an update under DeepSpeed takes than in the plain loop, in ms: the median of the rounds' own.

    Attributes:
        title: of the model.
        engine: how DeepSpeed was set up.
        tensors: parameters DeepSpeed handles.
        with_ms, plain_ms: whole updates.
        ms, low, high: the difference with its quartiles.
        host_ms: of CPU time, likewise.
    """

    title: str
    engine: str
    tensors: int
    with_ms: float
    plain_ms: float
    ms: float
    low: float
    high: float
    host_ms: float

    def row(self) -> dict[str, Any]:
        """Return a row of the table."""
        return {
            "model": self.title,
            "DeepSpeed": self.engine,
            "tensors": self.tensors,
            "update ms": round(self.with_ms, 2),
            "plain ms": round(self.plain_ms, 2),
            "overhead ms": round(self.ms, 2),
            "quartiles": f"{self.low:.2f} to {self.high:.2f}",
            "of CPU time, ms": round(self.host_ms, 2),
        }


def narrow(data: Data) -> Data:
    """Return the same data with a model of as many parameter tensors, as narrow as its heads allow."""
    from mnemos.engine.settings import parse_assignment, resolve

    model = resolve(data.preset, dict(parse_assignment(text) for text in data.assignments)).model
    width, decoder = (heads * -(-LEAST_WIDTH // heads) for heads in (model.heads, model.decoder_heads))
    widths = [f"model.width={width}", f"model.ffn={4 * width}", f"model.decoder_width={decoder}"]
    folder = data.folder / "narrow"
    folder.mkdir(exist_ok=True)
    return replace(data, folder=folder, assignments=[*data.assignments, *widths])


def overhead(
    data: Data,
    kind: str,
    *,
    title: str,
    precision: str,
    rounds: int,
    steps: int,
    advance: Callable[[], Any] = lambda: None,
) -> list[Overhead]:
    """Measure the pretext update of one kind under DeepSpeed and in a plain loop, window by window."""
    own, forced, plain = (
        make_training(data, kind, vocab=None, precision=precision, plain=True, deepspeed=user)
        for user in (None, FORCED, None)
    )
    engines = {f"ZeRO-{own.engine.stage}, the engine's choice": own, "ZeRO-1": forced}
    tensors = {name: len(list(one.engine.engine.module.parameters())) for name, one in engines.items()}
    raws = raw_batches(own, "pretext", steps)
    trainings = {**engines, "plain": plain_training(plain)}
    sides = [training_side(name, one, raws, data.batch) for name, one in trainings.items()]
    for side in sides:
        warm_up(side, own.device, times=2)
    measure(sides, own.device, rounds, advance)
    for one in engines.values():
        one.engine.release()
    base = sides[-1]
    return [_difference(side, base, title, tensors[side.name], steps) for side in sides[:-1]]


def _difference(side: Side, base: Side, title: str, tensors: int, steps: int) -> Overhead:
    """Return what a side takes beyond the plain loop, an update."""
    pairs = zip(side.seconds, base.seconds, strict=True)
    busy = zip(side.host_seconds, base.host_seconds, strict=True)
    low, middle, high = quartiles([1e3 * (one - other) / steps for one, other in pairs])
    return Overhead(
        title=title,
        engine=side.name,
        tensors=tensors,
        with_ms=1e3 * quartiles(side.seconds)[1] / steps,
        plain_ms=1e3 * quartiles(base.seconds)[1] / steps,
        ms=middle,
        low=low,
        high=high,
        host_ms=quartiles([1e3 * (one - other) / steps for one, other in busy])[1],
    )
