"""What cannot be a graph, or would be a wrong one, is noticed, told once, and computed all the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder, Work
from torch import Tensor, nn

from mnemos.engine.graph_recorder import refusal
from mnemos.engine.step_graph import Shared, StepGraph, forward_replaced
from mnemos.kernels.counter_rng import uniform
from mnemos.sharding.stream import RawBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# A small step


def batch(number: int, rows: int = 4) -> RawBatch:
    generator = torch.Generator().manual_seed(number)
    return RawBatch(
        step=number,
        member=0,
        data=torch.randint(1, 256, (rows, 1, 2, 2), dtype=torch.uint8, generator=generator),
        scale_B=torch.full((rows,), (1 + number) / 255),
        shift_B=torch.full((rows,), 0.1 * number),
        place_B=torch.arange(rows) + number * rows,
    )


class Small:
    """A model of two layers, of which a step uses one, and a graph of its step without warm-up."""

    def __init__(
        self, recorder: FakeRecorder | None = None, agree: Callable[[str], str] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)})
        self.recorder = recorder or FakeRecorder()
        self.told: list[str] = []
        self.shared = Shared(
            self.recorder,
            dtype=torch.float32,
            tell=self.told.append,
            agree=agree or (lambda reason: reason),
        )
        self.graph = self.another()

    def another(self) -> StepGraph:
        return StepGraph(
            self.compute, list(self.model.parameters()), name="small", shared=self.shared, warm_up=0
        )

    def compute(self, raw: RawBatch) -> Tensor:
        values = raw.data.flatten(1).float() * raw.scale_B[:, None] + raw.shift_B[:, None]
        loss: Tensor = self.model["used"](values).square().mean()
        return loss

    def step(self, number: int) -> tuple[Tensor, list[Tensor | None]]:
        """Return loss and gradients, the latter taken from the parameters."""
        loss = self.graph.loss(batch(number))
        loss.backward()
        gradients = [value.grad for value in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return loss.detach(), gradients

    def right(self, number: int) -> bool:
        """Tell whether a step gives the loss and the gradients of autograd."""
        loss, found = self.step(number)
        expected = self.compute(batch(number))
        wanted = torch.autograd.grad(expected, list(self.model["used"].parameters()))
        return (
            torch.equal(loss, expected.detach())
            and all(
                torch.equal(one, two) for one, two in zip(found[:2], wanted, strict=True) if one is not None
            )
            and [value is None for value in found] == [False, False, True, True]
        )


def test_a_batch_is_replayed_from_its_own_values_and_nothing_of_it_is_kept() -> None:
    small = Small()
    raw = batch(0)
    small.graph.loss(raw).backward()
    small.model.zero_grad(set_to_none=True)
    assert small.right(1) and small.right(2) and small.graph.replays == 3
    assert torch.equal(raw.data, batch(0).data), "the batch the graph was made with is the caller's"


def test_gradients_are_handed_over_without_a_copy() -> None:
    small = Small()
    shared = small.shared.gradients(list(small.model["used"].parameters()))
    _, found = small.step(0)
    assert [value.data_ptr() for value in found if value is not None] == [
        value.data_ptr() for value in shared
    ]


def test_graphs_of_a_stage_share_the_tensors_of_gradients() -> None:
    small = Small()
    first, small.graph = small.graph, small.another()
    assert small.right(0)
    small.graph, second = first, small.graph
    assert small.right(1)
    small.graph = second
    assert small.right(2) and small.recorder.captures == 2
    assert len({value.data_ptr() for value in small.shared._gradients.values()}) == 2


def test_a_batch_of_another_shape_or_type_is_computed_without() -> None:
    small = Small()
    assert small.right(0)
    odd = (batch(1, rows=3), replace(batch(1), data=batch(1).data.short()))
    for raw in odd:
        assert torch.equal(small.graph.loss(raw), small.compute(raw))
    assert small.right(2)
    assert (small.graph.eager, small.graph.replays, small.told) == (2, 2, [])


# What cannot be a graph is said once, and computed


class Failing(FakeRecorder):
    """Fails in one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def aside(self, work: Work, *, may_wait: bool) -> None:
        if self.place == "waiting" and not may_wait:
            raise RuntimeError("called a synchronizing CUDA operation\nat a place")
        work()

    def capture(self, work: Work) -> Work:
        if self.place == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return (lambda: None) if self.place == "nothing" else super().capture(work)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("waiting", "called a synchronizing CUDA operation"),
        ("capture", "operation not permitted when stream is capturing"),
        ("nothing", "its loss differs by nan"),
    ],
)
def test_a_graph_that_cannot_be_made_is_told_and_done_without(place: str, said: str) -> None:
    small = Small(Failing(place))
    assert small.right(0) and small.right(1)
    assert len(small.told) == 1 and said in small.told[0] and "\n" not in small.told[0]
    assert small.told[0].startswith("small: no CUDA graph is used, because ")
    assert (small.graph.eager, small.graph.replays, small.recorder.captures) == (2, 0, 0)


@pytest.mark.parametrize(("factor", "told"), [(1.0, 0), (1 + 2.0**-12, 0), (1.01, 1), (float("nan"), 1)])
def test_a_replay_must_give_the_gradients_of_the_step(factor: float, told: int) -> None:
    class Wrong(FakeRecorder):
        def capture(self, work: Work) -> Work:
            replay = super().capture(work)

            def wrong() -> None:
                replay()
                small.shared.gradients(list(small.model["used"].parameters()))[1].mul_(factor)

            return wrong

    small = Small(Wrong())
    small.step(0)
    assert len(small.told) == told and small.graph.replays == 1 - told
    assert not told or "the gradient of a parameter (3,) differs by" in small.told[0]
    assert not told or small.right(1)


@pytest.mark.parametrize("kept", ["weights", "data", "scale_B", "shift_B", "place_B"])
def test_a_graph_must_read_weights_and_batch_anew(kept: str) -> None:
    class Old(FakeRecorder):
        """Replays with one thing as it was when the graph was made."""

        def capture(self, work: Work) -> Work:
            replay = super().capture(work)
            tensors = (
                [value.data for value in small.model["used"].parameters()]
                if kept == "weights"
                else [getattr(seen[-1], kept)]
            )
            old = [tensor.clone() for tensor in tensors]

            def replay_old() -> None:
                now = [tensor.clone() for tensor in tensors]
                torch._foreach_copy_(tensors, old)
                replay()
                torch._foreach_copy_(tensors, now)

            return replay_old

    class Watched(Small):
        def compute(self, raw: RawBatch) -> Tensor:
            seen.append(raw)
            chance_B = uniform(0, raw.place_B, 1)
            values = (raw.data.flatten(1) * raw.scale_B[:, None] + raw.shift_B[:, None]) * chance_B
            loss: Tensor = self.model["used"](values).square().mean()
            return loss

    seen: list[RawBatch] = []
    small = Watched(Old())
    raw = batch(0)
    rows = torch.arange(4.0)
    raw = replace(raw, scale_B=raw.scale_B * (1 + rows), shift_B=raw.shift_B + rows)
    before = [value.detach().clone() for value in small.model.parameters()]
    loss = small.graph.loss(raw)
    assert torch.equal(loss, small.compute(raw)) and small.graph.replays == 0
    assert len(small.told) == 1 and "differs by" in small.told[0]
    assert all(torch.equal(one, two) for one, two in zip(small.model.parameters(), before, strict=True))


def test_numbers_that_are_not_finite_only_put_the_graph_off() -> None:
    small = Small()
    with torch.no_grad():
        small.model["used"].bias[0] = float("inf")
    small.step(0)
    assert (small.recorder.captures, small.graph.eager, small.told) == (0, 1, [])
    with torch.no_grad():
        small.model["used"].bias[0] = 0.0
    assert small.right(1) and small.graph.replays == 1


def test_all_ranks_do_without_where_one_must() -> None:
    asked: list[str] = []

    def agree(reason: str) -> str:
        asked.append(reason)
        return "rank 1 has no memory left"

    small = Small(agree=agree)
    assert small.right(0) and small.right(1)
    assert asked == [""] and len(small.told) == 1 and "because rank 1 has no memory left;" in small.told[0]


def test_weights_that_move_end_the_graph() -> None:
    small = Small()
    assert small.right(0)
    small.model["used"].weight.data = small.model["used"].weight.data + 1
    assert small.right(1) and small.right(2)
    assert len(small.told) == 1 and "weights were moved in memory" in small.told[0]


def test_gradients_that_are_kept_end_the_graph() -> None:
    small = Small()
    small.graph.loss(batch(0)).backward()
    expected = [value.grad.clone() for value in small.model["used"].parameters() if value.grad is not None]
    added = torch.autograd.grad(small.compute(batch(1)), list(small.model["used"].parameters()))
    small.graph.loss(batch(1)).backward()
    for value, before, more in zip(small.model["used"].parameters(), expected, added, strict=True):
        assert value.grad is not None and torch.equal(value.grad, before + more)
    assert len(small.told) == 1 and "gradients are kept from one update to the next" in small.told[0]


def test_autocast_refuses_a_graph() -> None:
    small = Small()
    with torch.autocast("cpu"):
        small.step(0)
    assert small.recorder.captures == 0 and "torch autocast keeps casts" in small.told[0]


# Misuse


def test_a_loss_scaled_after_the_hand_over_is_refused() -> None:
    small = Small()
    with pytest.raises(RuntimeError, match=r"differentiated with a factor of 0\.5; it must be 1"):
        (small.graph.loss(batch(0)) * 0.5).backward()


def test_the_gradients_of_an_older_loss_are_refused() -> None:
    small = Small()
    old = small.graph.loss(batch(0))
    value = old.detach().clone()
    small.graph.loss(batch(1))
    assert torch.equal(old.detach(), value), "the loss itself stays"
    with pytest.raises(RuntimeError, match="older loss"):
        old.backward()
    old = small.graph.loss(batch(2))
    small.another().loss(batch(3))
    with pytest.raises(RuntimeError, match="older loss"):  # all graphs share the tensors
        old.backward()


# Around it


def test_a_replaced_forward_keeps_the_hooks_and_comes_back() -> None:
    module, seen = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    own, x = module.forward, torch.ones(1, 2)
    with forward_replaced(module, lambda values: own(values) + 1):
        replaced = module(x)
    assert seen == ["before", "after"] and torch.equal(replaced, own(x) + 1)
    with pytest.raises(KeyError), forward_replaced(module, lambda values: values):
        raise KeyError
    assert torch.equal(module(x), own(x)) and "forward" not in vars(module)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"zero": 2}, None),
        ({"user": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}}, None),
        ({"device": CPU}, "the device is cpu; use a CUDA device"),
        ({"zero": 3}, "parallel.zero"),
        ({"accumulate": 4}, "made of 4 micro-batches"),
        ({"user": {"torch_autocast": {"enabled": True}}}, "torch_autocast"),
        ({"user": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, "offload_optimizer"),
    ],
)
def test_where_a_stage_can_use_graphs(changes: dict[str, Any], said: str | None) -> None:
    found = refusal(**{"device": CUDA, "zero": 1, "accumulate": 1, "user": None, **changes})
    assert found is None if said is None else found is not None and said in found
