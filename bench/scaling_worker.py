"""One rank under bench/scaling.py: makes a stage ready, then measures what it is asked for.

The only argument is the descriptor of a socket. Lines of JSON come and go through it: first the request, answered with
facts about the stage, then one question after the other, the name of one of `QUESTIONS` and its number.
"""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnemos.engine import dist
from mnemos.engine.arguments import parse
from mnemos.engine.curriculum import make_plan
from mnemos.engine.optimizer import active_parts
from mnemos.engine.stage_training import StageTraining

LEARNING_RATE = 1e-4
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 28  # of a tensor whose all-reduce gives the bandwidth
EMPTY_CALLS = 30
NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather"}


class Rank:
    """One rank's stage.

    Args:
        flags: of `engine/train.py`.
    """

    def __init__(self, flags: list[str]) -> None:
        plan = make_plan(parse(flags), dist.world_size())
        self.training = StageTraining(plan, plan.stages[-1])
        self.training.engine.optimizer.set_rate(LEARNING_RATE)
        self.kept = next(self.training.batches(0))
        self.training.train_step(self.kept)  # the first one allocates
        self.training.train_step(self.kept)

    def facts(self) -> dict[str, Any]:
        """Return what the model has to know about the stage."""
        training = self.training
        kind = training.sets[0].manifest.kind
        workers = training.settings.data.workers
        return {
            "kind": kind,
            "zero": training.engine.stage,
            "batch": training.settings.training.batch // dist.world_size(),
            "micro_batch": training.micro,
            "element_bytes": 2 if training.bf16 else 4,
            "groups": [
                [group["part"], sum(value.numel() for value in group["params"])]
                for group in training.engine.optimizer.param_groups
            ],
            "active": sorted(active_parts(kind, "pretext")),
            "readers": (4 if training.device.type == "cuda" else 0) if workers < 0 else workers,
            "device": str(training.device),
            "threads": torch.get_num_threads(),
        }

    def step(self, updates: int) -> dict[str, float]:
        """Return the seconds of an update on a batch that is there already."""
        wait()
        start = time.perf_counter()
        for _ in range(updates):
            self.training.train_step(self.kept)
        wait()
        return {"step_s": (time.perf_counter() - start) / updates}

    def split(self, updates: int) -> dict[str, float]:
        """Return the seconds of an update's forward, backward, optimiser and the rest, waiting for the device after each."""
        engine = self.training.engine
        spent = {"forward_s": 0.0, "backward_s": 0.0, "optimizer_s": 0.0}
        whole = {"whole_s": 0.0}
        with (
            timed(engine.engine, "forward", spent, "forward_s"),
            timed(engine.engine, "backward", spent, "backward_s"),
            timed(engine.optimizer, "step", spent, "optimizer_s"),
            timed(self.training, "train_step", whole, "whole_s"),
        ):
            for _ in range(updates):
                self.training.train_step(self.kept)
        spent["rest_s"] = max(0.0, whole["whole_s"] - sum(spent.values()))
        return {name: seconds / updates for name, seconds in spent.items()}

    def load(self, batches: int) -> dict[str, float]:
        """Return the seconds of reading and decoding a rank's batch in this process, on one core."""
        settings = self.training.settings
        alone = settings.data.model_copy(update={"workers": 0})
        self.training.settings = settings.model_copy(update={"data": alone})
        try:
            stream = self.training.batches(0)
            next(stream)  # opens the shards
            start, done = time.perf_counter(), 0
            for _ in islice(stream, batches):
                done += 1
            return {"load_s": (time.perf_counter() - start) / done}
        finally:
            self.training.settings = settings

    def updates(self, updates: int) -> dict[str, float]:
        """Return the seconds of an update as a run does it, reading and network included; one goes before, untimed."""
        stream = self.training.batches(0)
        self.training.train_step(next(stream))
        wait()
        dist.barrier()
        start, done = time.perf_counter(), 0
        for raw in islice(stream, updates):
            self.training.train_step(raw)
            done += 1
        wait()
        return {"update_s": (time.perf_counter() - start) / done}

    def network(self, calls: int) -> dict[str, float]:
        """Return an empty all-reduce's seconds, and seconds and bytes of one as large as the step's; all-gather likewise."""
        facts = self.facts()
        values = sum(
            values for part, values in facts["groups"] if part in facts["active"]
        )  # this rank's share
        size = min(max(values * dist.world_size() * facts["element_bytes"], LEAST_BYTES), MOST_BYTES)
        dtype, world = self.training.dtype, dist.world_size()
        found: dict[str, float] = {}
        for name, count in (("empty", world), ("full", size // facts["element_bytes"])):
            whole = torch.zeros(count - count % world, dtype=dtype, device=self.training.device)
            part = torch.zeros(len(whole) // world, dtype=dtype, device=self.training.device)
            number = EMPTY_CALLS if name == "empty" else calls
            reduce_s = _seconds(partial(torch.distributed.all_reduce, whole), number)
            gather_s = _seconds(partial(torch.distributed.all_gather_into_tensor, whole, part), number)
            found |= {f"all-reduce {name}_s": reduce_s, f"all-gather {name}_s": gather_s}
            found[f"{name}_bytes"] = len(whole) * facts["element_bytes"]
        return found

    def count(self, _: int) -> dict[str, list[int]]:
        """Return calls and bytes of each collective in one update."""
        with Counted() as counted:
            self.training.train_step(self.kept)
        return counted.found


class Counted(TorchDispatchMode):
    """Counts collectives by name: calls, and bytes of the largest of a call's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            calls = self.found.setdefault(NAMES.get(name, name), [0, 0])
            calls[0] += 1
            calls[1] += max((_bytes(arg) for arg in args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))


def _seconds(call: Callable[[], object], number: int) -> float:
    call()
    wait()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(number):
        call()
    wait()
    return (time.perf_counter() - start) / number


@contextmanager
def timed(owner: Any, method: str, spent: dict[str, float], name: str) -> Iterator[None]:
    """Add up the seconds that an object's method takes."""
    plain, own = getattr(owner, method), method in vars(owner)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        wait()
        start = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            wait()
            spent[name] += time.perf_counter() - start

    setattr(owner, method, clocked)
    try:
        yield
    finally:
        if own:
            setattr(owner, method, plain)
        else:
            delattr(owner, method)  # the class's is seen again


def wait() -> None:
    """Wait for the device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


QUESTIONS = ("step", "split", "load", "updates", "network", "count")


def main() -> None:
    """Answer until the other side closes."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rw") as lines:
        request = json.loads(lines.readline())
        dist.adopt_environment()
        dist.meet(600)
        rank = Rank(request["flags"])
        print(json.dumps(rank.facts()), file=lines, flush=True)
        for line in lines:
            question, number = json.loads(line)
            assert question in QUESTIONS, question
            print(json.dumps(getattr(rank, question)(number)), file=lines, flush=True)


if __name__ == "__main__":
    main()
    dist.leave(0)
