"""On a GPU: steps by CUDA graphs are the steps without, share their memory, wait for nothing, and fail in one sentence."""

from pathlib import Path

import pytest
import torch
from step_graph_cases import STEPS, RealStep
from torch import Tensor, nn

from mnemos.engine.graph_check import TOLERANCE
from mnemos.engine.graph_recorder import CudaRecorder
from mnemos.engine.preparing import Phase
from mnemos.engine.step_graph import WARM_UP, Shared, StepGraph
from mnemos.sharding.stream import RawBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run with -m gpu on one"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "phase"), STEPS)
def test_a_step_by_a_graph_is_the_step(tiny_sets: Path, name: str, phase: Phase, dtype: torch.dtype) -> None:
    told: list[str] = []
    eager, ours = (RealStep(tiny_sets, name, phase, DEVICE, dtype) for _ in range(2))
    graph = ours.graph(CudaRecorder(DEVICE), told)
    batches = [eager.raw(update) for update in range(WARM_UP + 5)]
    for update, raw in enumerate(batches):
        expected = eager.update(eager.compute(raw))
        replayed = update > WARM_UP
        try:
            if replayed:
                torch.cuda.set_sync_debug_mode("error")
            found = ours.update(graph.loss(raw))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (found - expected).abs() <= TOLERANCE[dtype] * expected.abs(), (update, told)
    assert (graph.eager, graph.replays, told) == (WARM_UP, 5, [])
    gap = torch.linalg.vector_norm(ours.weights() - eager.weights())
    assert gap <= TOLERANCE[dtype] * torch.linalg.vector_norm(eager.weights())


class Plain:
    """A step on data that lies on the GPU, with something in it that a capture may refuse."""

    def __init__(self, shared: Shared, *, refuses: str = "", width: int = 64, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(
            DEVICE
        )
        self.run = torch.compile(self.model) if compiled else self.model
        self.refuses = refuses
        self.graph = StepGraph(
            self.compute, list(self.model.parameters()), name=f"plain {refuses}", shared=shared
        )

    def compute(self, raw: RawBatch) -> Tensor:
        values = raw.data.flatten(1).float() * raw.scale_B[:, None]
        if self.refuses == "waits":
            values = values * float(values.amax())
        if self.refuses == "raises" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing")
        loss: Tensor = self.run(values).square().mean()
        return loss

    def right(self, number: int, rows: int = 8) -> bool:
        """Do a step, and tell whether loss and gradients are those of autograd."""
        width = self.model[0].weight.shape[1]
        generator = torch.Generator(DEVICE).manual_seed(number)
        raw = RawBatch(
            step=number,
            member=0,
            data=torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=DEVICE, generator=generator),
            scale_B=torch.full((rows,), 1 / 255, device=DEVICE),
            shift_B=torch.zeros(rows, device=DEVICE),
            place_B=torch.arange(rows, device=DEVICE),
        )
        loss = self.graph.loss(raw)
        loss.backward()
        found = [value.grad for value in self.model.parameters()]
        expected = self.compute(raw)
        wanted = torch.autograd.grad(expected, list(self.model.parameters()))
        pairs = [
            (loss, expected),
            *((one, two) for one, two in zip(found, wanted, strict=True) if one is not None),
        ]
        close = all(torch.allclose(one, two, rtol=1e-3, atol=1e-6) for one, two in pairs)
        del found
        self.model.zero_grad(set_to_none=True)
        return close and len(pairs) == 1 + len(wanted)


@pytest.mark.parametrize(("refuses", "said"), [("waits", "synchroniz"), ("raises", "not while capturing")])
def test_what_cannot_be_captured_is_told_and_leaves_the_gpu_sound(refuses: str, said: str) -> None:
    told: list[str] = []
    shared = Shared(CudaRecorder(DEVICE), dtype=torch.float32, tell=told.append)
    bad, good = Plain(shared, refuses=refuses), Plain(shared)
    for number in range(WARM_UP + 3):
        assert bad.right(number) and good.right(number)
    assert len(told) == 1 and said in told[0] and "\n" not in told[0]
    assert (bad.graph.replays, good.graph.replays) == (0, 3)
    assert torch.rand(4, device=DEVICE).isfinite().all(), "random numbers go on"


def test_compiled_blocks_are_captured() -> None:
    told: list[str] = []
    plain = Plain(Shared(CudaRecorder(DEVICE), dtype=torch.float32, tell=told.append), compiled=True)
    assert all(plain.right(number) for number in range(WARM_UP + 3))
    assert (plain.graph.replays, told) == (3, [])


def test_graphs_of_a_stage_share_their_memory() -> None:
    told: list[str] = []
    shared = Shared(CudaRecorder(DEVICE), dtype=torch.float32, tell=told.append)
    rows, width = 8192, 1024  # activations of 128 MiB and more
    one, graphs, taken = Plain(shared, width=width), [], []
    for _ in range(3):
        one.graph = StepGraph(one.compute, list(one.model.parameters()), name="one", shared=shared)
        graphs.append(one.graph)  # all stay
        assert all(one.right(number, rows) for number in range(WARM_UP + 1))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert told == [] and all(graph.replays == 1 for graph in graphs)
    batch_bytes = rows * width  # each keeps one
    assert taken[2] - taken[1] <= 2 * batch_bytes + 2**23, taken
