"""AdamW that leaves alone what took no part in a step.

A step trains one modality in one phase: the other tokenizers, and in rehearsal the decoder, have no gradient. Under
DeepSpeed a missing gradient is not missing: ZeRO 0 to 2 fill it with zeros, so that momentum and weight decay still
move the parameter, and ZeRO 3 applies the previous gradient again. Either would be forgetting made by the optimiser.
So parameters are grouped by the part of the model they belong to, every ZeRO stage keeps groups apart and updates
them through `step`, and `step` skips the groups of parts that are idle: values, moments and step counts stay.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.engine.settings import TrainingSettings
from mnemos.engine.slots import learning_rate

_PARTS = (  # prefix of a parameter's name -> part; the longest prefixes first
    ("encoder.blocks.", "blocks"),
    ("encoder.stem.", "stem"),
    ("encoder.tokenizers.", "tokenizer.{}"),
    ("encoder.unused.", "unused"),
    ("image_decoder.heads.", "head.{}"),
    ("image_decoder.positions_", "head.{}"),
    ("image_decoder.", "decoder"),
    ("word_head.", "head.text"),
)


def part_of(name: str) -> str:
    """Return the part a parameter of `Pretrainer` belongs to, such as "blocks" or "tokenizer.image"."""
    for prefix, part in _PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).partition(".")[0])
    raise ValueError(f"parameter {name!r} belongs to no part; add its prefix to optimizer._PARTS")


def active_parts(kind: str, phase: str) -> frozenset[str]:
    """Return the parts that a step on this kind of data trains in this phase (pretext or rehearsal)."""
    parts = {"blocks", f"tokenizer.{kind}"}
    if kind != "text":
        parts.add("stem")
    if phase == "pretext":
        parts |= {f"head.{kind}"} | (set() if kind == "text" else {"decoder"})
    return frozenset(parts)


class PartAdamW(torch.optim.AdamW):
    """Fused AdamW over parts; set `active` and the rate before each step.

    Args:
        groups: parameter groups with a "part" entry each, from `parameter_groups`.
        settings: betas and weight decay; the learning rate is set by `set_update` or `set_rate`.

    Attributes:
        active: parts that the next step updates.
        found_inf: None, or fp32 [] on the device: where it is 1, a step leaves values, moments and step counts as they are.
            Source: torch.amp.GradScaler, which tells fused optimisers in this way.
    """

    active: frozenset[str] = frozenset()  # nothing may move when made: ZeRO 0 in bf16 takes a step
    found_inf: Tensor | None = None
    _rates_S: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], settings: TrainingSettings) -> None:
        betas = (settings.beta1, settings.beta2)
        super().__init__(
            groups, lr=settings.base_lr, betas=betas, weight_decay=settings.weight_decay, fused=True
        )

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the learning rate of every group: a number, or fp32 [] on the device."""
        for group in self.param_groups:
            group["lr"] = rate

    def use_rates(self, rates_S: Tensor) -> None:
        """Take the learning rates of a stage's updates, from `rate_table`, fp32 and on the device; see `set_update`."""
        if rates_S.dtype != torch.float32 or rates_S.ndim != 1:
            raise ValueError(
                f"learning rates came as {rates_S.dtype} of shape {tuple(rates_S.shape)}; the fused kernel reads float32, "
                "one for each update; use rate_table"
            )
        self._rates_S = rates_S

    def set_update(self, step: int) -> None:
        """Set the learning rate of every group to that of update `step`: a view of the table, nothing is launched.

        Raises:
            ValueError: there is no table, or it has no such update.
        """
        num_steps = 0 if self._rates_S is None else len(self._rates_S)
        if self._rates_S is None or not 0 <= step < num_steps:
            raise ValueError(
                f"update {step} has no learning rate; the table has {num_steps}; call use_rates with the rates of the stage"
            )
        self.set_rate(self._rates_S[step])

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the rate as a number: of a view, a checkpoint would hold the whole table."""
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the active parts; give every parameter its (zero) moments, which DeepSpeed links once, at once."""
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = _fresh_state(parameter)
        self.param_groups = [group for group in groups if group["part"] in self.active]
        try:
            if self.param_groups:
                super().step(closure)
        finally:
            self.param_groups = groups


def rate_table(num_steps: int, peak: float, warmup: float) -> Tensor:
    """Return fp32 [S], the learning rate of every update of a stage, each rounded once; see `learning_rate`."""
    return torch.tensor(
        [learning_rate(step, num_steps, peak, warmup) for step in range(num_steps)], dtype=torch.float32
    )


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return what AdamW starts from; the step count is fp32 on the device, as its fused form needs."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Return one group per part and kind of decay: matrices decay, 1-D parameters (biases, norms, scales) do not."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part, decays = getattr(parameter, "part", None) or part_of(name), parameter.ndim > 1
        decay = settings.weight_decay if decays else 0.0
        group = groups.setdefault((part, decays), {"params": [], "weight_decay": decay, "part": part})
        group["params"].append(parameter)
    return list(groups.values())
