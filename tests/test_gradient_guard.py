"""An update with a gradient that is not finite on one rank is left out, on every rank, bit for bit; nothing else is.

The unit tests look at the guard alone; `guard_worker.py` trains under DeepSpeed, ZeRO 0 to 3, in fp32 and bf16.
"""

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guard_worker import UPDATES
from launching import free_port
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnemos.engine.gradient_guard import GradientGuard, forget_skipped_gradients

WORKER = Path(__file__).with_name("guard_worker.py")
VARIANTS = {
    f"zero {zero} {precision}": (zero, precision) for zero in range(4) for precision in ("fp32", "bf16")
}
VARIANTS["zero 0 cast"] = (0, "cast")
ALONE = ["zero 0 bf16", "zero 0 cast", "zero 1 fp32", "zero 2 bf16", "zero 3 fp32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")


def parameters(device: torch.device, dtype: torch.dtype = torch.float32, num: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(5, 7, dtype=dtype, device=device)) for _ in range(num)]


def backward(parameter: nn.Parameter, gradient: Tensor | float) -> None:
    """Let autograd bring a gradient, and take it away as ZeRO 2 and 3 do."""
    parameter.backward(torch.as_tensor(gradient, dtype=parameter.dtype).to(parameter).expand_as(parameter))
    parameter.grad = None


def told(guard: GradientGuard) -> tuple[float, float]:
    guard.close_update()
    return float(guard.found_inf), float(guard.skipped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 6)])
def test_one_value_anywhere_flags_its_update_only(
    device: torch.device, dtype: torch.dtype, value: float, place: tuple[int, int]
) -> None:
    for spoilt in range(3):
        watched = parameters(device, dtype)
        guard = GradientGuard(watched, device)
        flag, count = guard.found_inf, guard.skipped
        for number, parameter in enumerate(watched):
            gradient = torch.ones_like(parameter)
            if number == spoilt:
                gradient[place] = value
            backward(parameter, gradient)
        assert told(guard) == (1.0, 1.0)
        for parameter in watched:
            backward(parameter, 1.0)
        assert told(guard) == (0.0, 1.0), "the next update is judged by itself"
        assert guard.found_inf is flag and guard.skipped is count and flag.dtype == torch.float32
        guard.remove()


@pytest.mark.parametrize("micro_batch", range(4))
@pytest.mark.parametrize("spoilt", range(3))
def test_every_micro_batch_counts(device: torch.device, micro_batch: int, spoilt: int) -> None:
    watched = parameters(device)
    guard = GradientGuard(watched, device)
    for update in range(3):
        for now in range(4):
            for number, parameter in enumerate(watched):
                bad = update == 1 and now == micro_batch and number == spoilt
                backward(parameter, math.inf if bad else 1.0)
        assert told(guard) == (float(update == 1), float(update >= 1))


def test_infinities_of_both_signs_do_not_cancel(device: torch.device) -> None:
    one, two, three = parameters(device)
    guard = GradientGuard([one, two, three], device)
    gradient = torch.ones_like(one)
    gradient[0, 0], gradient[0, 1] = math.inf, -math.inf
    backward(one, gradient)
    assert told(guard) == (1.0, 1.0)
    backward(two, math.inf)
    backward(three, -math.inf)
    assert told(guard) == (1.0, 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_finite_values_are_let_through(device: torch.device, dtype: torch.dtype) -> None:
    """35 of them add up to 2.1e6, which fp16 has no number for."""
    watched = parameters(device, dtype)
    guard = GradientGuard(watched, device)
    for _ in range(3):
        for parameter in watched:
            backward(parameter, 6e4)
        assert told(guard) == (0.0, 0.0)
    wide = [parameter for parameter in watched if dtype != torch.float16]
    for parameter in wide:
        backward(parameter, 1e36)
        backward(parameter, -2e36)
    guard.close_update()
    assert guard.found_inf == 0 and not guard.found_inf.signbit()


def test_parts_without_a_gradient_do_not_matter(device: torch.device) -> None:
    watched = parameters(device)
    guard = GradientGuard(watched, device)
    assert told(guard) == (0.0, 0.0)
    backward(watched[1], math.nan)
    assert told(guard) == (1.0, 1.0)
    backward(watched[0], 1.0)  # the spoilt one is idle
    assert told(guard) == (0.0, 1.0)
    frozen = nn.Parameter(torch.zeros(3, device=device), requires_grad=False)
    assert told(GradientGuard([frozen], device)) == (0.0, 0.0)


class Launches(TorchDispatchMode):
    """Writes down what is launched; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_an_update_costs_one_launch_a_gradient_and_five_more(device: torch.device) -> None:
    watched = parameters(device)
    guard = GradientGuard(watched, device)
    for parameter in watched:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        with Launches() as launches:
            for parameter in watched:
                guard._add(parameter)
            guard.close_update()
        assert launches.names == ["sum"] * 3 + ["sum", "sub", "nan_to_num_", "add_", "zero_"]


def test_no_gradient_is_kept(device: torch.device) -> None:
    (parameter,) = parameters(device, num=1)
    guard = GradientGuard([parameter], device)
    parameter.backward(torch.ones_like(parameter))
    assert parameter.grad is not None
    storage = weakref.ref(parameter.grad.untyped_storage())
    gradient = weakref.ref(parameter.grad)
    parameter.grad = None
    assert gradient() is None and storage() is None
    guard.remove()


def test_removed_hooks_add_nothing(device: torch.device) -> None:
    watched = parameters(device)
    guard = GradientGuard(watched, device)
    guard.remove()
    backward(watched[0], math.nan)
    assert told(guard) == (0.0, 0.0)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in watched)


def test_a_guard_made_too_late_says_so(device: torch.device) -> None:
    (parameter,) = parameters(device, num=1)
    parameter.register_post_accumulate_grad_hook(lambda mine: setattr(mine, "grad", None))
    GradientGuard([parameter], device)
    with pytest.raises(RuntimeError, match="make the GradientGuard before DeepSpeed wraps the model"):
        parameter.backward(torch.ones_like(parameter))


@pytest.mark.parametrize("overflow", [False, True])
def test_only_a_skipped_update_is_forgotten(overflow: bool) -> None:
    wrapped = SimpleNamespace(overflow=overflow, grad_partitions_flat_buffer=torch.ones(4))
    forget_skipped_gradients(wrapped)
    assert bool(wrapped.grad_partitions_flat_buffer.any()) is not overflow
    wrapped.grad_partitions_flat_buffer.fill_(1.0)
    forget_skipped_gradients(wrapped)  # after a micro-batch of the next update
    assert wrapped.grad_partitions_flat_buffer.all()


def train(folder: Path, names: list[str], *, ranks: int) -> dict[str, dict[str, Any]]:
    """Return, for each variant, what every rank saw."""
    request, answer = folder / "request.json", folder / "answer.json"
    asked = {
        "folder": str(folder),
        "answer": str(answer),
        "variants": {name: VARIANTS[name] for name in names},
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, request],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        told_us = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(text[-3000:] for text in told_us)
    found: dict[str, dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    assert len(found) == ranks
    return {name: {rank: seen[name] for rank, seen in found.items()} for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("alone"), ALONE, ranks=1)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("together"), list(VARIANTS), ranks=2)


def check(by_rank: dict[str, Any], name: str) -> int:
    """Hold what every rank saw against the plan of updates; return how many ranks there were."""
    zero, precision = VARIANTS[name]
    in_bf16 = precision == "cast" or (
        precision == "bf16" and zero > 0
    )  # at 0 the engine keeps fp32 masters itself
    weights = "torch.bfloat16" if in_bf16 else "torch.float32"
    spoilt = [float(update.spoilt != 0.0) for update in UPDATES[:-1]]
    assert 0 < sum(spoilt) < len(spoilt)
    for rank, seen in by_rank.items():
        assert all(map(math.isfinite, seen["losses"])), f"rank {rank}: the losses tell nothing"
        assert seen["weights"] == weights, f"rank {rank}"
        assert seen["found"] == spoilt, f"rank {rank}"
        assert seen["skipped"] == [sum(spoilt[: number + 1]) for number in range(len(spoilt))], f"rank {rank}"
        assert seen["stayed"] == [True] * int(sum(spoilt)), f"rank {rank}: a spoilt update changed something"
        assert all(seen["moved"]), f"rank {rank}: an update did nothing"
        assert all(seen["as without"]), f"rank {rank}: a spoilt update changed a later one"
    return len(by_rank)


@pytest.mark.parametrize("name", ALONE)
def test_a_spoilt_update_is_as_if_it_had_not_been(alone: dict[str, Any], name: str) -> None:
    assert check(alone[name], name) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_gradient_spoilt_on_one_rank_is_left_out_on_both(together: dict[str, Any], name: str) -> None:
    assert check(together[name], name) == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_goes_on_and_holds_no_table_of_rates(together: dict[str, Any], name: str) -> None:
    for seen in together[name].values():
        assert all(seen["restored"]), seen["restored"]
        assert 1_000 < seen["largest file"] < 1_000_000  # the table has 4 MB
