"""DeepSpeed around the model: the full weights back out of it, and its release."""

import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.engine import dist
from mnemos.engine.decoder import WordHead
from mnemos.engine.deepspeed_config import deepspeed_config, zero_stage
from mnemos.engine.encoder import Block
from mnemos.engine.optimizer import PartAdamW, parameter_groups
from mnemos.engine.settings import Settings


class Engine:
    """One stage's model under DeepSpeed.

    Args:
        model: a fresh `Pretrainer`; it belongs to the engine from now on.
        settings: of the run.
        bf16: compute in bf16 with fp32 master weights, else in fp32.
        micro_batch: samples of one forward pass on this rank.
        accumulate: micro-batches of one update.
        user: the user's DeepSpeed configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        bf16: bool,
        micro_batch: int,
        accumulate: int,
        user: dict[str, Any] | None,
    ) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        self.stage = zero_stage(settings, user)
        self.bf16 = bf16
        self._names = [name for name, _ in model.named_parameters()]
        if self.stage == 3:  # these read their children's parameters directly: fetch each as a whole
            set_z3_leaf_modules(model, [Block, WordHead])
        self.optimizer = PartAdamW(
            parameter_groups(model.to(dist.device()), settings.training), settings.training
        )
        with dist.quiet():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(
                    settings, bf16=bf16, micro_batch=micro_batch, accumulate=accumulate, user=user
                ),
            )
        self.optimizer.step()  # nothing is active yet: gives every part its moments before DeepSpeed links them

    def __call__(self, *inputs: Any) -> Tensor:
        """Run the model's forward."""
        loss: Tensor = self.engine(*inputs)
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward one micro-batch's part of an update; after the last one, step the active parts."""
        self.engine.backward(loss, scale_wrt_gas=False)  # the parts add up, they are not averaged
        self.engine.step()

    def full_weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights of the whole model on the CPU, by name; collective, every rank calls it."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(zip(self._names, self.engine.module.parameters(), strict=True))
        if self.stage == 0 and self.bf16:
            wrapped = self.engine.optimizer
            groups = zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True)
            master = {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}
            full = {name: master[id(parameter)] for name, parameter in parameters.items()}
        elif self.stage == 0:
            full = parameters
        else:
            full = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
        return {name: value.detach().float().cpu().clone() for name, value in full.items()}

    def release(self) -> None:
        """Give back everything, so that the next stage starts with an empty process."""
        from deepspeed.runtime.zero import parameter_offload

        with dist.quiet():
            self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed keeps every module of ZeRO 3 in it for ever
        del self.engine
        gc.collect()


def computes_in_bf16(precision: str) -> bool:
    """Resolve `training.precision`: auto is bf16 on a GPU or on a CPU with bf16 instructions."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if flags.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text
