"""Notice a gradient that is not a number before the optimiser takes it; nothing waits for the device.

One infinite or undefined value in a gradient would spoil weights and moments for good. A hook on every parameter sums
each gradient as soon as it is there, before DeepSpeed sends it away: the sum is finite only if every value is (values
would have to add up to 3e38 otherwise). `PartAdamW` leaves everything as it is where the flag says so.

N slots, one for each parameter and one for what is carried over.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from mnemos.engine import dist


class GradientGuard:
    """Watches the gradients of some parameters; made before DeepSpeed wraps them, so that its hooks run first.

    Args:
        parameters: whose gradients are watched; one without a gradient in an update is no matter.
        device: theirs.

    Attributes:
        found_inf: fp32 [] on the device, always the same tensor: 1 where a gradient of the last closed update was not
            finite on any rank, else 0. `PartAdamW.found_inf` takes it.
        skipped: fp32 [] on the device, always the same tensor: closed updates of which that was so; the same on all ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        watched = [parameter for parameter in parameters if parameter.requires_grad]
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._sums_N = torch.zeros(1 + len(watched), dtype=torch.float32, device=device)
        self._slots = self._sums_N.unbind()
        self._next = 1  # slot 0 is carried over
        self._hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]
            for parameter in watched
        ]

    def close_update(self) -> None:
        """Set the flag for the update whose last backward is done, and begin the next; collective, nothing waits."""
        total = self._sums_N.sum()
        torch.sub(total, total, out=self.found_inf)  # 0, or NaN where the sum is not finite
        self.found_inf.nan_to_num_(nan=1.0)
        if dist.world_size() > 1:
            distributed.all_reduce(self.found_inf, op=distributed.ReduceOp.MAX)
        self.skipped.add_(self.found_inf)
        self._sums_N.zero_()
        self._next = 1

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(self, parameter: Tensor) -> None:
        """Put the sum of a gradient into the next free slot: one launch, and nothing is kept.

        Raises:
            RuntimeError: somebody else's hook has taken the gradient away.
        """
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError(
                "a gradient was taken away before it could be checked; make the GradientGuard before DeepSpeed wraps the model"
            )
        if self._next == len(self._slots):  # another micro-batch begins
            self._slots[0].copy_(self._sums_N.sum())
            self._next = 1
        slot = self._slots[self._next]
        if gradient.dtype == torch.bfloat16 and gradient.device.type == "cpu":
            # Summed in fp32 all the same, but asked for fp32 a CPU would first copy the whole gradient. bf16 reaches as far.
            slot.copy_(gradient.sum())
        else:
            torch.sum(gradient, dim=None, dtype=torch.float32, out=slot)
        self._next += 1


def forget_skipped_gradients(wrapped: Any) -> None:
    """Clear the gradients of an update that ZeRO 3 has skipped by itself; call it after every step of the engine.

    ZeRO 3 looks at the norm of all gradients and skips an update whose norm is not finite. But it keeps the gradients, and
    those of a part that is idle in the updates after would make it skip these as well, until that part has its turn.

    Args:
        wrapped: `DeepSpeedZeroOptimizer_Stage3`.
    """
    if wrapped.overflow:
        wrapped.grad_partitions_flat_buffer.zero_()
        wrapped.overflow = False  # done: the next update's first micro-batches must not be cleared too
