"""Run by test_step_graph.py on one or two ranks: some updates under DeepSpeed, eagerly and by graphs.

Two kinds of steps take turns, as in a stage with rehearsal: one trains all of a small model, the other leaves its head out.
The last argument names the file rank 0 writes: for each configuration and way ("eager", "graphs") the losses of every
update and the weights after the last (exact hex), how many steps were replayed, and what was told.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fake_recorder import FakeRecorder
from torch import Tensor, nn

from mnemos.engine import dist
from mnemos.engine.step_graph import Shared, StepGraph, forward_replaced
from mnemos.kernels.counter_rng import uniform
from mnemos.sharding.stream import RawBatch

UPDATES, ROWS, FACTORS = 11, 4, (0.25, 0.5)  # of the two kinds of steps


class Model(nn.Module):
    """A body, which both kinds train, and a head; one parameter takes part in nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 32))
        self.head = nn.Sequential(nn.GELU(), nn.Linear(32, 64))
        self.unused = nn.Parameter(torch.ones(7))

    def forward(self, x_BN: Tensor, kind: int) -> Tensor:
        features = self.body(x_BN)
        found = features if kind else self.head(features)
        return FACTORS[kind] * F.mse_loss(found.float(), x_BN[:, : found.shape[1]].float())


def batch(update: int, rows: int = ROWS) -> RawBatch:
    """Return this rank's part of an update."""
    place_B = torch.arange(rows) + (update * dist.world_size() + dist.rank()) * rows
    generator = torch.Generator().manual_seed(int(place_B[0]))
    data = torch.randint(0, 256, (rows, 1, 8, 8), dtype=torch.uint8, generator=generator)
    scale_B = torch.full((rows,), 1 / 255)
    return RawBatch(
        step=update, member=0, data=data, scale_B=scale_B, shift_B=torch.zeros(rows), place_B=place_B
    )


def prepared(raw: RawBatch, dtype: torch.dtype) -> Tensor:
    """Return [B, 64] model values, a quarter of them hidden by chances keyed by place."""
    values = raw.data.flatten(1).float() * raw.scale_B[:, None] + raw.shift_B[:, None]
    return (values * (uniform(3, raw.place_B, 64) >= 0.25)).to(dtype)


def train(zero: int, dtype: torch.dtype, *, graphs: bool) -> dict[str, Any]:
    import deepspeed

    torch.manual_seed(0)
    model = Model()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "log_level": "error",
    }
    if zero:
        config["zero_optimization"] = {
            "stage": zero,
            "contiguous_gradients": zero != 1 or dist.world_size() > 1,  # as in a stage
            "overlap_comm": False,
            "reduce_bucket_size": 2000,  # several buckets
        }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with dist.quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    own, told = engine.module.forward, []
    shared = Shared(FakeRecorder(), dtype=dtype, tell=told.append, agree=agree)
    kinds = [
        StepGraph(
            lambda raw, kind=kind: own(prepared(raw, dtype), kind),
            list(model.parameters()),
            name=f"kind {kind}",
            shared=shared,
            warm_up=2,
        )
        for kind in (0, 1)
    ]
    losses = []
    for update in range(UPDATES):
        kind = update % 3 // 2  # 0, 0, 1
        raw = batch(update, ROWS if update != UPDATES - 2 else ROWS - 1)  # one batch is short
        if graphs:
            with forward_replaced(engine.module, kinds[kind].loss):
                loss = engine(raw)
        else:
            loss = engine(prepared(raw, dtype), kind)
        losses.append(loss.item().hex())
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
    weights = b"".join(value.detach().float().numpy().tobytes() for value in model.parameters())
    with dist.quiet():
        engine.destroy()
    return {
        "losses": losses,
        "weights": hashlib.sha256(weights).hexdigest(),
        "counts": [[kind.eager, kind.replays] for kind in kinds],
        "told": told,
    }


def agree(mine: str) -> str:
    return next(filter(None, dist.join({dist.rank(): mine}).values()), "")


def main() -> None:
    dist.adopt_environment()
    torch.set_num_threads(1)
    dist.meet(60)
    answers: dict[str, Any] = {}
    for zero, dtype in itertools.product((0, 1, 2), (torch.float32, torch.bfloat16)):
        answers[f"zero {zero}, {dtype}"] = {
            way: train(zero, dtype, graphs=way == "graphs") for way in ("eager", "graphs")
        }
    if dist.is_main():
        Path(sys.argv[-1]).write_text(json.dumps(answers), encoding="utf-8")
    dist.barrier()
    dist.leave(0)


if __name__ == "__main__":
    main()
