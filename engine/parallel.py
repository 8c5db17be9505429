"""DeepSpeed around the model: the full weights back out of it, and its release."""

import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.engine import dist
from mnemos.engine.decoder import DecoderBlock, DecoderStem, WordHead
from mnemos.engine.deepspeed_config import deepspeed_config, zero_stage
from mnemos.engine.encoder import Block, FlatPatchTokenizer, PatchTokenizer, Stem, TextTokenizer
from mnemos.engine.flat_parameters import flatten_parameters, unflatten
from mnemos.engine.gradient_guard import GradientGuard, forget_skipped_gradients
from mnemos.engine.optimizer import PartAdamW, parameter_groups, part_of
from mnemos.engine.settings import Settings
from mnemos.engine.step_graph import StepGraph, forward_replaced
from mnemos.sharding.stream import RawBatch

# Each is one or two tensors for DeepSpeed, whose host time goes by tensors.
_UNITS = (
    Block,
    DecoderBlock,
    DecoderStem,
    FlatPatchTokenizer,
    PatchTokenizer,
    Stem,
    TextTokenizer,
    WordHead,
)


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
        self.stage = zero_stage(settings, user, dist.world_size())
        self.bf16, self.user = bf16, user
        compute = torch.bfloat16 if bf16 else torch.float32
        if settings.training.compile:
            for block in model.modules():
                if isinstance(block, Block | DecoderBlock):
                    block.forward = torch.compile(block.forward)  # type: ignore[method-assign, assignment]
        model.to(dist.device())
        # What goes by tensors costs little on one CPU; without flat gradients, there, no gradient is copied.
        alone = self.stage == 0 and dist.world_size() == 1 and dist.device().type == "cpu"
        self.layout = "plain" if alone and not bf16 else "flat"
        if self.layout == "flat":
            flatten_parameters(model, _UNITS, part_of, compute=compute)
        if self.stage == 3:  # their children have no parameters of their own: one fetch each
            set_z3_leaf_modules(model, [Block, DecoderBlock, WordHead])
        self.guard = GradientGuard(model.parameters(), dist.device())
        self.optimizer = PartAdamW(parameter_groups(model, settings.training), settings.training)
        with dist.quiet():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(
                    settings, bf16=bf16, micro_batch=micro_batch, accumulate=accumulate, user=user
                ),
            )
        if self.stage == 0 and dist.world_size() == 1:
            self.engine.enable_backward_allreduce = False  # else gradients are joined, summed and copied back
        self.optimizer.found_inf = self.guard.found_inf
        self.optimizer.step()  # nothing is active yet: gives every part its moments before DeepSpeed links them

    def __call__(self, *inputs: Any) -> Tensor:
        """Run the model's forward."""
        loss: Tensor = self.engine(*inputs)
        return loss

    def loss_of(self, graph: StepGraph, raw: RawBatch) -> Tensor:
        """Return a graph's loss of a batch, from within the model's forward, so that DeepSpeed knows of it."""
        with forward_replaced(self.engine.module, graph.loss):
            loss: Tensor = self.engine(raw)
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward one micro-batch's part of an update; after the last one, step the active parts."""
        self.engine.backward(loss, scale_wrt_gas=False)  # the parts add up, they are not averaged
        if self.engine.is_gradient_accumulation_boundary():
            self.guard.close_update()
        self.engine.step()
        if self.stage == 3:
            forget_skipped_gradients(self.engine.optimizer)

    def full_weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights of the whole model on the CPU, by name; collective, every rank calls it."""
        from deepspeed.utils import safe_get_full_fp32_param

        module = self.engine.module
        values: dict[str, Tensor] = dict(module.named_parameters())
        if self.stage:
            values = {name: safe_get_full_fp32_param(value) for name, value in values.items()}
        full = unflatten(module, {name: value.detach().float().cpu() for name, value in values.items()})
        return {name: value.clone() for name, value in full.items()}

    def release(self) -> None:
        """Give back everything, so that the next stage starts with an empty process."""
        from deepspeed.runtime.zero import parameter_offload

        self.guard.remove()
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
