"""Run by test_gradient_guard.py on one or two ranks: updates with spoilt gradients under real DeepSpeed.

Reads a request (JSON file, last argument) and writes an answer: for each variant, what every rank saw in `UPDATES`. The
gradient is spoilt on one rank, in one micro-batch, in one part of the model, and the loss stays finite.
"""

import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_data import tiny_settings
from torch import Tensor, nn

from mnemos.engine import dist
from mnemos.engine.deepspeed_config import deepspeed_config
from mnemos.engine.gradient_guard import GradientGuard, forget_skipped_gradients
from mnemos.engine.optimizer import PartAdamW, parameter_groups

MICRO_BATCHES = 2
RATES = 1_000_000  # of the table: 4 MB, which no checkpoint may hold


@dataclass(frozen=True)
class Update:
    """One update: the modality it trains, and what is added to a gradient of one rank in one micro-batch."""

    kind: str
    spoilt: float = 0.0
    rank: int = 0
    micro_batch: int = 0


UPDATES = [
    Update("image"),
    Update("volume", spoilt=math.nan, rank=-1, micro_batch=0),
    Update("image"),  # the spoilt part is idle
    Update("image", spoilt=math.inf, rank=0, micro_batch=1),
    Update("image"),
    Update("volume"),
]


class Spoilt(torch.autograd.Function):
    """The identity, with a value added to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient + ctx.value, None


class Model(nn.Module):
    """Two tokenizers, of which one takes part, and blocks; named as in `Pretrainer`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.tokenizers = nn.ModuleDict({kind: nn.Linear(6, 16) for kind in ("image", "volume")})
        self.encoder.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))

    def forward(self, kind: str, x_BP: Tensor, spoilt: float) -> Tensor:
        tokenizer = self.encoder.tokenizers[kind]
        x_BD = Spoilt.apply(tokenizer(x_BP.to(tokenizer.weight.dtype)), spoilt)
        for block in self.encoder.blocks:
            x_BD = x_BD + block(x_BD)
        return x_BD.float().square().mean()


class Trained:
    """The model under DeepSpeed, with its guard.

    Args:
        stage: of ZeRO.
        precision: fp32, bf16, or "cast": bf16 weights with fp32 masters are DeepSpeed's, also where the engine keeps its own.
    """

    def __init__(self, stage: int, precision: str) -> None:
        import deepspeed

        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        torch.manual_seed(0)
        model = Model()
        samples = 2 * MICRO_BATCHES
        settings = tiny_settings(parallel__zero=stage, training__batch=samples * dist.world_size())
        config = deepspeed_config(
            settings,
            bf16=precision == "bf16",
            micro_batch=2,
            accumulate=MICRO_BATCHES,
            user={"zero_optimization": {"stage": stage}},
        )
        if precision == "cast":
            config["bf16"] = {"enabled": True}
        self.stage = stage
        self.guard = GradientGuard(model.parameters(), dist.device())
        self.optimizer = PartAdamW(parameter_groups(model, settings.training), settings.training)
        self.optimizer.use_rates(torch.linspace(1e-2, 0.0, RATES))
        self.optimizer.found_inf = self.guard.found_inf
        with dist.quiet():
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.optimizer.step()

    def update(self, number: int) -> list[float]:
        """Do one of `UPDATES`; return its losses."""
        asked = UPDATES[number]
        self.optimizer.active = frozenset({"blocks", f"tokenizer.{asked.kind}"})
        self.optimizer.set_update(1000 * number)
        losses = []
        for micro_batch in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(100 * number + 10 * micro_batch + dist.rank())
            here = micro_batch == asked.micro_batch and dist.rank() == asked.rank % dist.world_size()
            x_BP = torch.randn(2, 6, generator=generator)
            loss = self.engine(asked.kind, x_BP, asked.spoilt if here else 0.0)
            losses.append(float(loss.detach()))
            self.engine.backward(loss, scale_wrt_gas=False)
            if self.engine.is_gradient_accumulation_boundary():
                self.guard.close_update()
            self.engine.step()
            if self.stage == 3:
                forget_skipped_gradients(self.engine.optimizer)
        return losses

    def state(self) -> list[Tensor]:
        """Return a copy of this rank's weights (as computed with, and fp32), moments and step counts."""
        tensors = [
            getattr(parameter, "ds_tensor", parameter) for parameter in self.engine.module.parameters()
        ]
        for master, moments in self.optimizer.state.items():
            tensors += [master, *moments.values()]
        return [tensor.detach().clone() for tensor in tensors]

    def release(self) -> None:
        self.guard.remove()
        with dist.quiet():
            self.engine.destroy()


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Compare bit for bit: torch.equal alone would take -0 for 0. Under ZeRO 3 the first update makes the moments."""
    return len(one) == len(two) and all(
        left.dtype == right.dtype
        and torch.equal(left, right)
        and torch.equal(left.signbit(), right.signbit())
        for left, right in zip(one, two, strict=True)
    )


def train(stage: int, precision: str, folder: Path) -> dict[str, Any]:
    """Do all updates, and beside them only those that are not spoilt; then go on from a checkpoint."""
    trained, reference = Trained(stage, precision), Trained(stage, precision)
    seen: dict[str, Any] = {
        "stayed": [],
        "moved": [],
        "as without": [],
        "found": [],
        "skipped": [],
        "losses": [],
    }
    for number, asked in enumerate(UPDATES[:-1]):
        before = trained.state()
        seen["losses"] += trained.update(number)
        after = trained.state()
        if asked.spoilt == 0.0:
            reference.update(number)
            seen["moved"].append(not same(before, after))
            seen["as without"].append(same(after, reference.state()))
        else:
            seen["stayed"].append(same(before, after))
        seen["found"].append(float(trained.guard.found_inf))
        seen["skipped"].append(float(trained.guard.skipped))
    seen["weights"] = str(next(trained.engine.module.parameters()).dtype)
    with dist.quiet():
        trained.engine.save_checkpoint(str(folder), tag="last")
    dist.barrier()
    seen["largest file"] = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    restored = Trained(stage, precision)
    with dist.quiet():
        restored.engine.load_checkpoint(str(folder), tag="last")
    seen["restored"] = [same(trained.state(), restored.state())]
    last = len(UPDATES) - 1
    for each in (trained, restored, reference):
        each.update(last)
    seen["restored"] += [
        same(trained.state(), restored.state()),
        same(trained.state(), reference.state()),
        trained.engine.get_lr() == restored.engine.get_lr(),
    ]
    for each in (trained, restored, reference):
        each.release()
    return seen


def main() -> None:
    request = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    dist.adopt_environment()
    dist.meet(120)
    torch.set_num_threads(1)
    answers = {
        name: train(stage, precision, Path(request["folder"]) / name.replace(" ", "-"))
        for name, (stage, precision) in request["variants"].items()
    }
    everybody = dist.join({dist.rank(): answers})
    if dist.is_main():
        Path(request["answer"]).write_text(json.dumps(everybody), encoding="utf-8")
    dist.barrier()
    dist.leave(0)


if __name__ == "__main__":
    main()
