"""Measurements survive exactly, once each, also over a crash and a resume."""

import json
import math
import struct
from pathlib import Path

import pytest

from mnemos.engine.metrics_log import MetricsLog, read_metrics


def record(
    step: int, phase: str = "pretext", loss: float = 0.5, **more: float
) -> dict[str, str | int | float | None]:
    return {"step": step, "modality": "ct", "phase": phase, "loss": loss, **more}


def test_the_exact_loss_comes_back(tmp_path: Path) -> None:
    loss = struct.unpack("f", struct.pack("f", 0.1))[0]  # an fp32 value
    with MetricsLog(tmp_path / "03-ct", stage="ct", tensorboard=False) as log:
        log.write([record(7, loss=loss, lr=3e-4, samples_per_s=120.5)])
    text = (tmp_path / "03-ct" / "metrics.jsonl").read_text()
    assert text.count("\n") == 1
    line = json.loads(text)
    assert list(line) == ["stage", "step", "modality", "phase", "loss", "loss_hex", "lr", "samples_per_s"]
    assert (line["stage"], line["step"], line["modality"], line["phase"]) == ("ct", 7, "ct", "pretext")
    assert float.fromhex(line["loss_hex"]) == loss
    assert (line["lr"], line["samples_per_s"]) == (3e-4, 120.5)


def test_lines_are_on_disk_after_every_write(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, stage="ct", tensorboard=False)
    log.write([record(1), record(1, "rehearsal")])
    assert [line["phase"] for line in read_metrics(tmp_path)] == ["pretext", "rehearsal"]
    log.write([record(2)])
    assert len(read_metrics(tmp_path)) == 3
    log.close()


def test_a_resume_drops_what_will_be_measured_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, stage="ct", tensorboard=False) as log:
        log.write([record(step) for step in range(10)])
    with MetricsLog(tmp_path, stage="ct", resume_at=6, tensorboard=False) as log:
        assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]
        log.write([record(6, loss=0.25)])
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(7))
    assert read_metrics(tmp_path)[-1]["loss"] == 0.25
    MetricsLog(tmp_path, stage="ct", resume_at=0, tensorboard=False).close()
    assert read_metrics(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"stage": "ct", "st', '{"stage": "ct", "step": 9}', "{}\n", "\x00\x00\n"])
def test_a_torn_line_goes_and_the_rest_stays(tmp_path: Path, torn: str) -> None:
    with MetricsLog(tmp_path, stage="ct", tensorboard=False) as log:
        log.write([record(0), record(1)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with MetricsLog(tmp_path, stage="ct", tensorboard=False) as log:
        log.write([record(2)])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]


def test_numbers_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, stage="ct") as log:
        log.write([record(0, loss=math.nan, lr=math.inf), record(1, loss=-math.inf)])
    first, second = read_metrics(tmp_path)
    assert (first["loss"], first["loss_hex"], first["lr"]) == (None, "nan", None)
    assert (second["loss"], second["loss_hex"]) == (None, "-inf")


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    with (
        MetricsLog(tmp_path, stage="ct", tensorboard=False) as log,
        pytest.raises(ValueError, match="rehearsal"),
    ):
        log.write([record(0, "training")])
    assert read_metrics(tmp_path) == []


def test_nothing_measured_is_an_empty_list(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []


def test_tensorboard_shows_the_same_numbers_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, stage="ct") as log:
        log.write([record(step, loss=step / 4, lr=0.5) for step in range(4)])
    with MetricsLog(tmp_path, stage="ct", resume_at=2) as log:
        log.write([record(2, loss=9.0), record(2, "validation", loss=0.75)])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["pretext/ct/loss", "pretext/ct/lr", "validation/ct/loss"]
    assert [(event.step, event.value) for event in events.Scalars("pretext/ct/loss")] == [
        (0, 0.0),
        (1, 0.25),
        (2, 9.0),
    ]
    assert [(event.step, event.value) for event in events.Scalars("validation/ct/loss")] == [(2, 0.75)]
