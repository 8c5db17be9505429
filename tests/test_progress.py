"""Progress in a log file: a line now and then, none from the other ranks."""

import pytest

from mnemos.engine import progress
from mnemos.engine.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("2/5 xray", 100, done=20) as bar:
        bar.advance(10, loss="0.5")
        assert capsys.readouterr().out == ""
        clock[0] = 20.0
        bar.advance(10, **{"loss": "0.4", "samples/s": "16"})
        assert capsys.readouterr().out == "2/5 xray: 40/100 steps, loss 0.4, samples/s 16, 60 s left\n"
        clock[0] = 40.0
        bar.advance(20)
        assert capsys.readouterr().out == "2/5 xray: 60/100 steps, 40 s left\n"


def test_other_ranks_are_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("2/5 xray", 100, shown=False) as bar:
        clock[0] = 60.0
        bar.advance(50, loss="0.5")
    assert capsys.readouterr() == ("", "")
