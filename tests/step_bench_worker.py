"""Run by test_step_bench.py in a process of its own, because DeepSpeed starts once: everything that needs a stage.

Arguments: a folder with tiny shard sets, a folder to write in, the file for the answer (JSON).
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_data import TINY

from mnemos.bench import step, step_numerics, step_plain, step_rates, step_rows
from mnemos.bench.step_data import find_sets
from mnemos.bench.step_inputs import (
    KINDS,
    PHASES,
    Data,
    drawn_weights,
    for_reference,
    make_training,
    raw_batches,
    rows_of,
)
from mnemos.bench.step_overhead import narrow, overhead, plain_training
from mnemos.bench.step_reference_training import ReferenceTraining
from mnemos.bench.step_rows import BENCH_PHASES, Bench, Task, check_losses, relative
from mnemos.bench.step_sides import OURS, PLAIN, prove_plain, training_side
from mnemos.engine import dist, objectives

MODEL = [text for text in TINY if text.startswith("model")]
WORDS = 500  # rows of a word table larger than the tokenizer's


def main() -> None:
    shards, folder, answer = (Path(text) for text in sys.argv[1:])
    dist.adopt_environment()
    dist.meet(120)
    torch.set_num_threads(1)
    folder.mkdir()
    data = Data(sets=find_sets(shards), folder=folder, preset="sample", batch=8, assignments=MODEL)
    found: dict[str, Any] = {
        "differences": differences(data),
        "drawn": drawn_differences(data),
        **refusals(data, shards, folder),
        "rows": timed(data),
        "plain": plain(data),
        "overhead": costs(data),
        "numerics": curves(data),
    }
    answer.write_text(json.dumps(found), encoding="utf-8")
    dist.leave(0)


def task_of(data: Data, kind: str, vocab: int | None = None, **more: Any) -> Task:
    settings: dict[str, Any] = {"phases": BENCH_PHASES, "steps": 1, "rounds": 1, "compiled": False}
    return Task(**{"data": data, "kind": kind, "vocab": vocab, "end_to_end": False, **settings, **more})


def differences(data: Data) -> dict[str, dict[str, float]]:
    """Hold the stage's own losses against the reference's."""
    cases = [(kind, vocab) for kind in KINDS for vocab in ((None, WORDS) if kind == "text" else (None,))]
    return {f"{kind} {vocab}": check_losses(task_of(data, kind, vocab)) for kind, vocab in cases}


def drawn_differences(data: Data) -> dict[str, list[float]]:
    """Do the same where all weights are drawn, those of decoder and word head, too, and the teacher is another model."""
    found = {}
    for kind in KINDS:
        training = plain_training(make_training(data, kind, vocab=WORDS, precision="fp32"))
        model: Any = training.engine.model  # type: ignore[attr-defined]
        model.load_state_dict(drawn_weights(model, seed=1))
        for phase in PHASES:
            (raw,) = raw_batches(training, phase, 1)
            assert training.teacher is not None
            weights = {name: value.detach().clone() for name, value in model.named_parameters()}
            reference = ReferenceTraining(
                training.shape,
                training.settings,
                weights,
                training.teacher.state_dict(),
                training.device,
                bf16=False,
                rate=1e-5,
            )
            inputs = for_reference(training, rows_of(training, raw, phase))
            theirs = reference.loss(inputs, phase).detach()
            ours = training.train_step(raw).detach()
            found[f"{kind} {phase}"] = [relative(ours, theirs), float(ours)]
    return found


@contextmanager
def disturbed() -> Iterator[None]:
    """Let one number of the reference differ."""
    make = step_rows.make_reference

    def other(training: Any, *, bf16: bool) -> ReferenceTraining:
        reference = make(training, bf16=bf16)
        with torch.no_grad():
            reference.model.predict["image"].bias[0] += 0.5  # type: ignore[operator]
        return reference

    with patch.object(step_rows, "make_reference", other):
        yield


def refusals(data: Data, shards: Path, folder: Path) -> dict[str, Any]:
    """Run the command with a disturbed reference, and with a reference far slower than what was published."""
    out = folder / "lines.jsonl"
    call = ["--shards", str(shards), "--preset", "sample", "--kinds", "image", "--phases", "pretext"]
    call += ["--rounds", "1", "--steps", "1"]
    call += ["--precision", "fp32", "--no-overhead", "--out", str(out)]
    call += [part for text in MODEL for part in ("--set", text)]
    with disturbed():
        losses = step.main([*call, "--unchecked"])
    fits = patch.multiple(step_rates, has_published_rate=lambda *_: True, gemm_rate=lambda *_: 1e9)
    far = {key: dict.fromkeys(rates, 1e12) for key, rates in step_rates.PUBLISHED.items()}
    with fits, patch.object(step_rates, "PUBLISHED", far):
        slow = step.main(call)
    near = {key: dict.fromkeys(rates, 1e-9) for key, rates in step_rates.PUBLISHED.items()}
    written = out.exists()
    with fits, patch.object(step_rates, "PUBLISHED", near):
        passed = step.main(call)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    unasked = step.main(call)
    return {"refused": [losses, slow, written], "passed": passed, "lines": lines, "unasked": unasked}


def timed(data: Data) -> list[dict[str, Any]]:
    bench = Bench(task=task_of(data, "volume", end_to_end=True), precision="bf16")
    bench.build()
    rows = [row for phase in BENCH_PHASES for row in bench.time(phase, 1e12, lambda: None)]
    bench.close()
    return rows


def plain(data: Data) -> dict[str, Any]:
    """Tell what a side without kernels changes, and whether one that still has kernels is found out."""
    training = make_training(data, "image", vocab=None, precision="fp32")
    raws = raw_batches(training, "pretext", 1)
    before, seen = objectives.gather_tokens, []
    with step_plain.plain_definitions():
        seen.append(objectives.gather_tokens is before)
    side = training_side(PLAIN, training, raws, 8)
    prove_plain(side)
    try:
        prove_plain(training_side(OURS, training, raws, 8))
    except step_plain.KernelRan as ran:
        told = str(ran)
    return {"same": seen, "restored": objectives.gather_tokens is before, "told": told}


def curves(data: Data) -> dict[str, Any]:
    with patch.object(step_numerics, "SEEDS", (0, 1)):
        return dict(step_numerics.numerics(data, "text", 2)[0])


def costs(data: Data) -> list[dict[str, Any]]:
    small = narrow(data)
    found = overhead(small, "image", title="narrow", precision="bf16", rounds=1, steps=1)
    return [one.row() for one in found]


if __name__ == "__main__":
    main()
