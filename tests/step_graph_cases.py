"""Steps as a stage runs them, from the raw batch to the weights: for the tests of step graphs on a CPU and on a GPU."""

from dataclasses import replace
from pathlib import Path

import torch
from fake_recorder import FakeRecorder
from test_objectives import Bench
from tiny_data import tiny_settings
from torch import Tensor

from mnemos.engine.encoder import Encoder
from mnemos.engine.graph_recorder import Recorder
from mnemos.engine.objectives import encode, local_count, visible_patches
from mnemos.engine.preparing import Phase
from mnemos.engine.step_graph import Shared, StepGraph
from mnemos.sharding.stream import RawBatch

STEPS: list[tuple[str, Phase]] = [
    ("xray", "pretext"),  # crops
    ("ct", "pretext"),  # mirrors
    ("pathology", "pretext"),
    ("xray", "rehearsal"),  # mixtures, a teacher
    ("ct", "rehearsal"),
]


class RealStep:
    """One kind of step with a model and an optimiser of its own; the same start for the same arguments."""

    def __init__(
        self, sets: Path, name: str, phase: Phase, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.bench = Bench(sets, name, tiny_settings(model__drop_path=0.3))
        self.phase, self.device, self.dtype = phase, device, dtype
        self.model = self.bench.model().to(device, dtype).train()
        torch.manual_seed(1)
        self.teacher = Encoder(self.bench.shape).to(device, dtype).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def raw(self, update: int, rows: int = 8) -> RawBatch:
        """Return the batch of one update, on the device."""
        samples = [(5 * update + 3 * row) % 32 for row in range(rows)]
        return self.bench.raw(samples, list(range(8 * update, 8 * update + rows))).to(self.device)

    def compute(self, raw: RawBatch) -> Tensor:
        shape = self.bench.shape
        rows = self.bench.preparer.images(self.bench.shards.manifest, raw, phase=self.phase, training=True)
        patches = visible_patches(shape, rows, self.dtype)
        target = None
        if self.phase == "rehearsal":
            with torch.no_grad():
                target = encode(self.teacher, replace(rows, keep=None), patches)
        factor = torch.full((), 1.0 / local_count(rows, self.phase), device=self.device)
        loss: Tensor = self.model(rows, patches, target, factor)
        return loss

    def graph(self, recorder: Recorder | None = None, told: list[str] | None = None) -> StepGraph:
        tell = (told if told is not None else []).append
        shared = Shared(recorder or FakeRecorder(), dtype=self.dtype, tell=tell)
        return StepGraph(self.compute, list(self.model.parameters()), name="a step", shared=shared)

    def update(self, loss: Tensor) -> Tensor:
        """Do one update; return the loss without its graph."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def weights(self) -> Tensor:
        return torch.cat([value.detach().float().flatten() for value in self.model.parameters()])
