"""The update around the reference model, as the MedCoSS authors make one: see `mnemos.bench.step_reference`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mnemos.bench.step_reference import Images, Inputs, ReferenceModel
from mnemos.engine.encoder import EncoderShape
from mnemos.engine.preparing import Phase
from mnemos.engine.settings import Settings


class ReferenceTraining:
    """The reference with optimiser, scaler and teacher.

    Args:
        shape: of the engine's encoder.
        settings: of the run.
        weights: of the engine, fp32 by name.
        teacher: of the engine's teacher, by the names in `Encoder`; None where there is none.
        device: to compute on.
        bf16: autocast to bf16 over fp32 weights, else all in fp32.
        rate: learning rate.
    """

    def __init__(
        self,
        shape: EncoderShape,
        settings: Settings,
        weights: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor] | None,
        device: torch.device,
        *,
        bf16: bool,
        rate: float,
    ) -> None:
        self.device, self.bf16, self.rate = device, bf16, rate
        frozen = {f"encoder.{name}": value.float() for name, value in (teacher or {}).items()}
        self.model, self.teacher = (ReferenceModel(shape, settings.model) for _ in range(2))
        for module, taken in ((self.model, weights), (self.teacher, {**weights, **frozen})):
            module.load_ours(taken)
            module.to(device).train()  # the teacher, too
        self.teacher.requires_grad_(False)
        training = settings.training
        self.optimizer = torch.optim.AdamW(
            _groups(self.model, training.weight_decay),
            lr=rate,
            betas=(training.beta1, training.beta2),
            foreach=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=bf16 and device.type == "cuda")

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context their forward runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def loss(self, inputs: Inputs, phase: Phase) -> Tensor:
        """Return the mean loss of a batch."""
        with self.autocast():
            if phase == "rehearsal":
                return self._distillation(inputs)
            return (
                self.model.image_loss(inputs) if isinstance(inputs, Images) else self.model.word_loss(inputs)
            )

    def _distillation(self, inputs: Inputs) -> Tensor:
        student = self.model.features(inputs)
        with torch.no_grad():  # DropPath runs, and drops nothing
            target = self.teacher.features(replace(inputs, keep=torch.ones_like(inputs.keep)))
        error_BL = ((student - target) ** 2).mean(-1)
        if isinstance(inputs, Images):
            return error_BL.mean()
        return (error_BL * inputs.valid_BL).sum() / inputs.valid_BL.sum()

    def train_step(self, inputs: Inputs, phase: Phase) -> float:
        """Do one update and return its loss, which waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        loss = self.loss(inputs, phase)
        value = loss.item()
        if phase == "rehearsal":
            value = loss.item()  # theirs reads the term, then the sum
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        _gradient_norm(self.model)  # computed and thrown away
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return value

    def forward_backward(self, inputs: Inputs, phase: Phase) -> None:
        """Compute the gradients and forget them: what published rates are of."""
        self.loss(inputs, phase).backward()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Tensor:
        """Return fp32 features [B, D] of a batch, nothing masked."""
        with self.autocast():
            return self.model.embed(inputs)


def _groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Return the groups of AdamW: matrices decay, all else does not."""
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]


def _gradient_norm(model: nn.Module) -> Tensor:
    norms = [one.grad.detach().norm(2) for one in model.parameters() if one.grad is not None]
    return torch.norm(torch.stack(norms), 2)
