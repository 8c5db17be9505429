"""What a stage writes down while it trains: one JSON line per measurement, and the same for TensorBoard.

A line is {"stage", "step", "modality", "phase", "loss", "loss_hex", ...}; `loss_hex` is the exact float
(`float.fromhex` reads it), so that two runs can be compared bit for bit.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PHASES = ("pretext", "rehearsal", "validation")
FILE_NAME = "metrics.jsonl"
Value = str | int | float | None


class MetricsLog:
    """Append measurements to `metrics.jsonl` and `tensorboard/` of a stage's folder; for rank 0 alone."""

    def __init__(
        self, stage_dir: Path, *, stage: str, resume_at: int | None = None, tensorboard: bool = True
    ) -> None:
        """Open the log, mended first: a line torn by a crash goes, and whatever will be measured again.

        Args:
            stage_dir: the stage's folder in the run directory; made if missing.
            stage: its name, written into every line.
            resume_at: the first step still to come. Lines of this step and later are dropped, so that none
                appears twice; 0 starts anew. None keeps every whole line.
            tensorboard: also write event files.
        """
        self.stage = stage
        self.stage_dir = stage_dir
        self.path = stage_dir / FILE_NAME
        self._resume_at = resume_at
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        stage_dir.mkdir(parents=True, exist_ok=True)
        self._mend()
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, records: Iterable[Mapping[str, Value]]) -> None:
        """Append one line a record, all flushed together.

        Args:
            records: each with step (updates done), modality, phase (one of `PHASES`) and loss (mean per term;
                nats for texts); any further numbers (lr, samples_per_s, ...) follow. A number that is not
                finite is written as null, its loss_hex as "nan" or "inf".

        Raises:
            ValueError: a phase outside `PHASES`.
        """
        lines = [self._line(record) for record in records]
        self._file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self._file.flush()
        if self._tensorboard:
            self._scalars(lines)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        """Return the log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log."""
        self.close()

    def _line(self, record: Mapping[str, Value]) -> dict[str, Value]:
        if record["phase"] not in PHASES:
            raise ValueError(
                f"metrics: phase {record['phase']!r}; allowed are {', '.join(PHASES)}; name one of them"
            )
        loss = record["loss"]
        line: dict[str, Value] = {"stage": self.stage}
        line |= {name: record[name] for name in ("step", "modality", "phase", "loss")}
        line["loss_hex"] = float(loss).hex() if loss is not None else None
        line |= {name: value for name, value in record.items() if name not in line}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }

    def _scalars(self, lines: Iterable[Mapping[str, Value]]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard itself hides events at and after purge_step that an earlier process wrote
            self._writer = SummaryWriter(
                str(self.stage_dir / "tensorboard"), purge_step=self._resume_at, flush_secs=30
            )
        for line in lines:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{line['phase']}/{line['modality']}/{name}", value, line["step"])

    def _mend(self) -> None:
        """Rewrite the file without torn lines and steps to come, whole or not at all."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        kept = [line for line in text.splitlines(keepends=True) if self._keeps(line)]
        if "".join(kept) != text:
            partial = self.path.with_name(FILE_NAME + ".part")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)

    def _keeps(self, line: str) -> bool:
        if not line.endswith("\n"):
            return False
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return False
        return self._resume_at is None or step < self._resume_at


def read_metrics(stage_dir: Path) -> list[dict[str, Value]]:
    """Return the whole lines of a stage's `metrics.jsonl`; an empty list where there is none."""
    path = stage_dir / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
