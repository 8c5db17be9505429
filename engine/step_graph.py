"""Forward and backward of a step as one CUDA graph: hundreds of launches become one, wherever shapes are fixed.

A graph replays what it recorded at the addresses it recorded. So a batch is copied into tensors that stay, and gradients
are left in tensors that stay, which all graphs of a stage share: one update is under way at a time. An autograd function
then hands the gradients to the parameters by an ordinary backward, so that whoever waits there (DeepSpeed's hooks, its
buckets and its reduction) meets them as ever. When a graph is made, its loss and gradients are compared with those computed
without it, on another batch and with other weights than it was made with; where they differ, or where it cannot be made,
the step says so and is computed without one.

What is captured must be a pure function of the batch's tensors and of weights that are changed in place. It must not wait
for the device, nor make anything that later steps keep (a cache must be full after the first steps).

Shape suffixes: B samples.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mnemos.engine.graph_check import TENSORS, TOLERANCE, changed, difference
from mnemos.engine.graph_recorder import Recorder, Work
from mnemos.sharding.stream import RawBatch

WARM_UP = 3  # steps without a graph: kernels are compiled and loaded, caches filled

_NOT_FINITE = "its loss or a gradient is not finite"


class Shared:
    """What the graphs of a stage have in common: their memory, and where they say what went wrong.

    Args:
        recorder: makes the graphs.
        dtype: that the steps compute in.
        tell: takes one sentence for the user.
        agree: returns the first reason of all ranks not to use a graph, "" if none has one, given this rank's; collective.
            Ranks must agree: ZeRO 2 sends gradients in the order in which they come.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        dtype: torch.dtype,
        tell: Callable[[str], None],
        agree: Callable[[str], str] = lambda reason: reason,
    ) -> None:
        self.recorder, self.tell, self.agree = recorder, tell, agree
        self.tolerance = TOLERANCE[dtype]
        self.turn = 0  # replays so far: whose gradients the shared tensors hold
        self._gradients: dict[int, Tensor] = {}  # by the parameter's id; the graphs keep the parameters

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors all graphs leave these parameters' gradients in, laid out as the parameters are."""
        for parameter in parameters:
            if id(parameter) not in self._gradients:
                self._gradients[id(parameter)] = torch.empty_like(parameter, requires_grad=False)
        return [self._gradients[id(parameter)] for parameter in parameters]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A graph with the tensors it reads and writes.

    Attributes:
        parameters: those that take part.
        addresses: theirs.
        raw: the batch it reads.
        loss: scalar it writes.
        gradients: of the parameters; written.
        replay: computes again.
    """

    parameters: Sequence[nn.Parameter]
    addresses: Sequence[int]
    raw: RawBatch
    loss: Tensor
    gradients: Sequence[Tensor]
    replay: Work

    def fits(self, raw: RawBatch) -> bool:
        """Tell whether a batch has the shapes and types that were captured."""
        pairs = [(getattr(raw, name), getattr(self.raw, name)) for name in TENSORS]
        return all(new.shape == old.shape and new.dtype == old.dtype for new, old in pairs)

    def run(self, raw: RawBatch) -> None:
        """Compute loss and gradients of a batch that fits; nothing waits."""
        for name in TENSORS:
            getattr(self.raw, name).copy_(getattr(raw, name), non_blocking=True)
        self.replay()


class StepGraph:
    """The loss of one kind of step, by a graph as soon as there is one.

    Args:
        compute: raw batch on the device -> scalar loss to differentiate, all weights and factors included; it must not
            depend on `RawBatch.step`.
        parameters: those that may take part.
        name: of the kind of step, for messages, such as "ct pretext".
        shared: of all graphs of the stage.
        warm_up: steps computed without a graph before it is made.

    Attributes:
        replays: steps computed by the graph so far.
        eager: steps computed without it so far: the first ones, and batches of another shape.
    """

    def __init__(
        self,
        compute: Callable[[RawBatch], Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        name: str,
        shared: Shared,
        warm_up: int = WARM_UP,
    ) -> None:
        self.compute, self.name = compute, name
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.replays = self.eager = 0
        self._shared, self._left = shared, warm_up
        self._recorded: _Recorded | None = None
        self._given_up = False
        self._upstream_checked = False

    def loss(self, raw: RawBatch) -> Tensor:
        """Return the loss of a batch on the device; its backward gives every parameter its gradient.

        Differentiate it with an upstream gradient of exactly 1 (no factor behind it), before any graph of the stage is
        asked for the next loss, and let nothing keep the gradients until then: they lie in the graphs' own memory, so that
        handing them over moves no byte.
        """
        if self._given_up or self._left > 0:
            self._left -= 1
            return self._eagerly(raw)
        recorded = self._recorded
        if recorded is not None and not recorded.fits(raw):
            return self._eagerly(raw)
        if any(parameter.grad is not None for parameter in self.parameters):
            return self._without("gradients are kept from one update to the next", raw)
        if recorded is None:
            try:
                recorded, reason = self._record(raw)
            except Exception as error:  # noqa: BLE001  # whatever refuses a graph, the step is possible without
                reason = f"making it failed ({_first_line(error)})"
            reason = self._shared.agree(reason)
            if reason == _NOT_FINITE:  # the next batch's may be
                return self._eagerly(raw)
            if reason or recorded is None:
                return self._without(reason, raw)
            self._recorded = recorded
        elif _addresses(recorded.parameters) != recorded.addresses:
            return self._without("weights were moved in memory", raw)
        else:
            recorded.run(raw)
        self.replays += 1
        self._shared.turn += 1
        return _HandOver.apply(self, recorded, self._shared.turn, *recorded.parameters)  # type: ignore[no-any-return, no-untyped-call]

    def _eagerly(self, raw: RawBatch) -> Tensor:
        self.eager += 1
        return self.compute(raw)

    def _without(self, reason: str, raw: RawBatch) -> Tensor:
        """Give up, say so, and compute the batch."""
        self._given_up, self._recorded = True, None
        self._shared.tell(
            f"{self.name}: no CUDA graph is used, because {reason}; the step is computed without, with the same results"
        )
        return self._eagerly(raw)

    def _record(self, raw: RawBatch) -> tuple[_Recorded | None, str]:
        """Return the graph, replayed on this batch, and ""; where its results cannot be trusted None, and why."""
        if torch.is_autocast_enabled(raw.data.device.type):
            return None, "torch autocast keeps casts from step to step"
        raw = replace(raw, **{name: getattr(raw, name).clone() for name in TENSORS})
        parameters: list[nn.Parameter] = []

        def find_parameters() -> None:
            gradients = torch.autograd.grad(self.compute(raw), self.parameters, allow_unused=True)
            pairs = zip(self.parameters, gradients, strict=True)
            parameters.extend(parameter for parameter, gradient in pairs if gradient is not None)

        recorder = self._shared.recorder
        recorder.aside(find_parameters, may_wait=True)
        loss = torch.zeros((), device=raw.data.device)
        gradients = self._shared.gradients(parameters)
        results = [loss, *gradients]

        def work() -> None:
            found = self.compute(raw)
            # Not backward(): the hooks of the parameters wait for the hand-over.
            torch._foreach_copy_(gradients, torch.autograd.grad(found, parameters))
            loss.copy_(found.detach())

        recorder.aside(work, may_wait=False)
        if not torch.stack([tensor.isfinite().all() for tensor in results]).all():
            return None, _NOT_FINITE
        replay = recorder.capture(work)
        with changed(parameters, raw):
            recorder.aside(work, may_wait=True)
            expected = [tensor.clone() for tensor in results]
            for tensor in results:
                tensor.fill_(math.nan)  # what the graph does not write shows
            replay()
            if reason := difference(results, expected, self._shared.tolerance):
                return None, reason
        replay()
        recorded = _Recorded(
            parameters=parameters,
            addresses=_addresses(parameters),
            raw=raw,
            loss=loss,
            gradients=gradients,
            replay=replay,
        )
        return recorded, ""

    def check(self, turn: int, upstream: Tensor) -> None:
        """Refuse a backward that would hand over wrong gradients.

        Raises:
            RuntimeError: another graph was replayed since, or the loss was scaled after it was handed over.
        """
        if turn != self._shared.turn:
            raise RuntimeError(
                f"{self.name}: the gradients of an older loss were asked for; differentiate a loss before the next one"
            )
        if self._upstream_checked:  # once: it waits for the device, and a caller does not change its ways
            return
        if float(upstream) != 1.0:
            raise RuntimeError(
                f"{self.name}: the loss is differentiated with a factor of {float(upstream)}; it must be 1, "
                "let the captured function include the factor"
            )
        self._upstream_checked = True


class _HandOver(torch.autograd.Function):
    """Stands for the graph in autograd: parameters in, the replay's loss out."""

    @staticmethod
    def forward(
        ctx: Any, graph: StepGraph, recorded: _Recorded, turn: int, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.graph, ctx.recorded, ctx.turn = graph, recorded, turn
        return recorded.loss.clone()  # the next replay overwrites it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graph.check(ctx.turn, upstream)
        # A new name that nobody else holds becomes .grad as it is; the shared tensor itself would be copied.
        return None, None, None, *(gradient.detach() for gradient in ctx.recorded.gradients)


def _addresses(parameters: Sequence[Tensor]) -> list[int]:
    return [parameter.data_ptr() for parameter in parameters]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def forward_replaced(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Let calls of a module run another function, between the module's own hooks.

    So a loss from a graph comes out of DeepSpeed's forward, which opens its books for the backward to come. What is
    captured must call the module's own forward, taken before (`own = module.forward`), which calls no hooks.
    """
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
