"""The processes that bench/scaling.py measures in, and random shards for them to read."""

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.bench.worker_process import WorkerProcess
from mnemos.engine.arguments import parse
from mnemos.engine.curriculum import make_plan
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import STORED_SIZES, Modality
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import train_tokenizer
from mnemos.sharding.writer import ShardSetWriter

WORKER = Path(__file__).with_name("scaling_worker.py")
RANKS = 2  # of the check
MODELLED = (1, 2)  # ZeRO stages
WORDS = [f"word{number}" for number in range(200)]


class Process(WorkerProcess):
    """One rank.

    Args:
        name: for messages and its log.
        folder: for its run and its log.
        ranks: how many it belongs to.
        rank: its number among them, or its GPU where it is alone.
        port: where they meet.
        flags: of `engine/train.py`.
    """

    def __init__(
        self, name: str, folder: Path, *, ranks: int, rank: int, port: int, flags: Sequence[str]
    ) -> None:
        environment = {
            **os.environ,
            "RANK": str(rank if ranks > 1 else 0),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(RANKS),  # as many share the machine's memory
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        super().__init__(name, WORKER, folder / f"{name}.log", environment)
        self.send({"flags": [*flags, "--run", str(folder / f"run-{name}")]})


def ask(processes: Sequence[Process], question: str, number: int) -> dict[str, Any]:
    """Ask all of them at once; return the answer of the slowest, for which the others would wait."""
    for process in processes:
        process.send([question, number])
    answers: list[dict[str, Any]] = [process.answer() for process in processes]
    return max(
        answers,
        key=lambda answer: sum(
            value for name, value in answer.items() if name.endswith("_s") and isinstance(value, float)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a measurement, all of them ready.

    Attributes:
        one: trains as a run of one rank does.
        many: know nothing of each other, but do what a rank of several does, network apart.
        joint: train together; none where two cannot be run.
        facts: what the first of `many` says of the stage.
    """

    one: list[Process]
    many: list[Process]
    joint: list[Process]
    facts: dict[str, Any]


@contextmanager
def started(folder: Path, flags: Sequence[str], batch: int, *, zero: int, pair: bool) -> Iterator[Ranks]:
    """Start the ranks.

    Args:
        folder: for runs and logs.
        flags: of `engine/train.py`, the batch apart.
        batch: samples of an update on one rank.
        zero: ZeRO stage of several ranks.
        pair: whether two can run at once.
    """
    config = folder / "deepspeed.json"
    as_of_several = {"stage": zero, "contiguous_gradients": True}
    config.write_text(json.dumps({"zero_optimization": as_of_several}), encoding="utf-8")
    alone = [*flags, "--set", f"training.batch={batch}"]
    together = [*flags, "--set", f"training.batch={RANKS * batch}"]
    number = RANKS if pair else 1
    with ExitStack() as stack:

        def start(name: str, ranks: int, rank: int, port: int, flags: Sequence[str]) -> Process:
            process = Process(f"{name}{rank}", folder, ranks=ranks, rank=rank, port=port, flags=flags)
            return stack.enter_context(process)

        one = [start("one", 1, 0, _free_port(), alone)]
        many = [
            start("many", 1, rank, _free_port(), [*alone, "--deepspeed_config", str(config)])
            for rank in range(number)
        ]
        facts = [process.answer() for process in (*one, *many)]  # while two or three start, not five
        port = _free_port()
        joint = [start("rank", RANKS, rank, port, together) for rank in range(number if pair else 0)]
        for process in joint:
            process.answer()
        yield Ranks(one=one, many=many, joint=joint, facts=facts[-1])


def check_flags(flags: Sequence[str], ranks: int) -> int:
    """Return the ZeRO stage; refuse, before anything is started, what `engine/train.py` would, and what is not modelled.

    Raises:
        UserError: see there, or a ZeRO stage that sends something else.
    """
    with tempfile.TemporaryDirectory(prefix="mnemos-scaling-") as folder:
        plan = make_plan(parse([*flags, "--run", str(Path(folder) / "run")]), ranks)
    if plan.settings.parallel.zero not in MODELLED:
        allowed = " and ".join(map(str, MODELLED))
        raise UserError(
            f"parallel.zero={plan.settings.parallel.zero} is not modelled, ZeRO {allowed} are; choose one of them"
        )
    return int(plan.settings.parallel.zero)


def make_shards(folder: Path, modality: Modality, preset: str, samples: int) -> None:
    """Write a set of random samples, of the size a preset takes."""
    stored = STORED_SIZES[preset]
    shape = {"text": (stored.text,), "image": stored.image, "volume": stored.volume}[modality.kind]
    tokenizer = folder / ".tokenizer.json"  # hidden: it is copied into the set of texts
    folder.mkdir(parents=True, exist_ok=True)
    if modality.kind == "text":
        train_tokenizer((_text(number, 60) for number in range(64)), 400).save(str(tokenizer))
    with ShardSetWriter(
        folder / modality.name,
        modality=modality,
        source="synthetic",
        shape=shape,
        spacing_mm=stored.spacing_mm if modality.kind == "volume" else None,
        preset=preset,
        classes=(),
        recipe={"drawn": "coarse random fields with noise, see bench/scaling_runs.py"},
        key=b"bench bench bench",
        tokenizer_file=tokenizer if modality.kind == "text" else None,
    ) as writer:
        for number in range(samples + samples // 4):
            array = (
                _text(number, shape[0] // 2) if modality.kind == "text" else _field(modality, shape, number)
            )
            scale = 1 / 255 if modality.kind == "image" else 1 / 1024
            sample = Sample(array=array, source=f"sample-{number}", group=f"group-{number}", scale=scale)
            writer.add("train" if number < samples else "val", sample)


def _field(modality: Modality, shape: tuple[int, ...], number: int) -> np.ndarray:
    rng = np.random.default_rng((11, number))
    lead = (modality.channels,) if modality.kind == "image" else ()
    coarse = rng.uniform(40, 210, (*lead, *(-(-size // 8) for size in shape)))
    for axis, size in enumerate(shape, start=len(lead)):
        coarse = np.repeat(coarse, 8, axis=axis).take(range(size), axis=axis)
    values = np.clip(coarse + rng.normal(0, 8, coarse.shape), 0, 255)
    return values.astype(np.uint8 if modality.kind == "image" else np.int16)


def _text(number: int, most: int) -> str:
    rng = np.random.default_rng((13, number))
    return " ".join(rng.choice(WORDS, size=rng.integers(4, most)))


def stage_flags(name: str, preset: str, data: Path, assignments: Sequence[str]) -> list[str]:
    """Return the flags of `engine/train.py` for a run of one stage alone that never ends by itself."""
    flags = ["--stage", name, "--preset", preset, "--data", str(data), "--steps", "1000000"]
    flags += ["--strategy", "sequential"]
    for text in (f"curriculum.stages=[{name}]", *assignments):
        flags += ["--set", text]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
