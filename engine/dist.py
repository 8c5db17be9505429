"""Ranks: who we are, how we meet, what rank 0 decided, and how we leave.

Does what launchers leave undone: rank variables from torchrun, SLURM, MPI or nobody; the network interface that
reaches the master; no compiler at the first run; one timeout for every process group; a clean exit.
"""

import contextlib
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mnemos.engine.cpu import keep_freed_memory, use_cores
from mnemos.sharding.command import USER_MISTAKE

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
_group_timeout: timedelta | None = None  # of process groups made from now on

_LAUNCHERS = (  # what launchers call rank, world size and local rank
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, deepspeed
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def adopt_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from whatever launcher started us.

    A plain `python` start becomes one rank; a SLURM batch script without srun counts as that too.
    """
    for rank, size, local in _LAUNCHERS:
        if rank in os.environ and size in os.environ and not _inside_batch_script(rank):
            os.environ.setdefault("LOCAL_RANK", os.environ.get(local, "0"))
            os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[rank], os.environ[size]
            break
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port() if world_size() == 1 else 29500))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Threads that wait for each other by spinning stall a step tenfold on a machine that does other work as well.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if interface := _interface_towards(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def rank() -> int:
    """Return this process's number among all ranks."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """Return this process's number among the ranks of its machine."""
    return int(os.environ["LOCAL_RANK"])


def local_world_size() -> int:
    """Return the number of ranks on this machine; all of them where the launcher does not tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size())))


def is_main() -> bool:
    """Tell whether this is rank 0, which decides, writes and prints."""
    return rank() == 0


@dataclass(frozen=True)
class Refusal:
    """Rank 0's verdict that nothing is to be done: everybody leaves with `code` (0 after --help)."""

    code: int


def device() -> "torch.device":
    """Return this rank's device: its GPU, else the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def meet(timeout_s: int = 1800) -> None:
    """Join the other ranks (NCCL where there are GPUs, else gloo); called again, only the timeout changes.

    Args:
        timeout_s: seconds any rank waits for the others, in every group, DeepSpeed's own included.
    """
    import torch
    import torch.distributed

    timeout = timedelta(seconds=timeout_s)
    _give_every_group(timeout)
    if torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(timeout)
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        use_cores(local_world_size())
        keep_freed_memory()
    else:
        torch.cuda.set_device(local_rank())
    with quiet():
        import deepspeed

    # Else the first run compiles a C++ extension; gloo gives the same sums without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        with quiet():
            deepspeed.init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
            )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        reason = f"port {port} is taken, perhaps by another run on this machine"
        print(f"error: {reason}; name a free one: deepspeed --master_port NUMBER ...", file=sys.stderr)
        leave(USER_MISTAKE)


def share(decide: Callable[[], T]) -> T | Refusal:
    """Return what rank 0 decides, on every rank; rank 0 has printed the reason of a `Refusal`.

    Args:
        decide: runs on rank 0 alone; leaving by `SystemExit` (after a message) becomes a Refusal.
    """
    verdict: Any = None
    if is_main():
        try:
            verdict = decide()
        except SystemExit as leaving:
            verdict = Refusal(leaving.code if isinstance(leaving.code, int) else 1)
    if world_size() == 1:
        return verdict  # type: ignore[no-any-return]
    meet()
    return broadcast(verdict)  # type: ignore[no-any-return]


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank (any picklable object; our own, never from a file)."""
    import torch
    import torch.distributed

    if world_size() == 1:
        return value
    payload = pickle.dumps(value) if is_main() else b""
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device())
    torch.distributed.broadcast(size, 0)
    data = torch.empty(int(size.item()), dtype=torch.uint8, device=device())
    if is_main():
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    torch.distributed.broadcast(data, 0)
    return pickle.loads(data.cpu().numpy().tobytes())  # type: ignore[no-any-return]


def broadcast_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return rank 0's tensor on every rank, in place; every rank gives one of the same shape and type."""
    import torch.distributed

    if world_size() > 1:
        torch.distributed.broadcast(tensor, 0)
    return tensor


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone and return its result on every rank; an error is raised on all of them."""
    outcome: tuple[bool, Any] = (True, None)
    if is_main():
        try:
            outcome = (True, work())
        except Exception as error:  # noqa: BLE001  # whatever it is, the other ranks wait for the outcome
            outcome = (False, error)
    done, value = broadcast(outcome)
    if not done:
        raise value
    return value  # type: ignore[no-any-return]


def total(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the sum of a tensor over all ranks, in place, on the device."""
    import torch.distributed

    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def join(mine: dict[K, V]) -> dict[K, V]:
    """Return the dictionaries of all ranks as one, the same on every rank; collective."""
    import torch.distributed as group

    if world_size() == 1:
        return dict(mine)
    parts: list[dict[K, V]] = [{}] * world_size()
    group.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def least(number: int) -> int:
    """Return the smallest of all ranks' numbers."""
    import torch

    return int(gather_rows(torch.tensor([number], device=device())).min())


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed

    if world_size() > 1:
        torch.distributed.barrier()


def gather_rows(rows: "torch.Tensor") -> "torch.Tensor":
    """Return the rows of all ranks, rank by rank; every rank gives as many."""
    import torch
    import torch.distributed

    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    gloo's threads abort a process that tears its groups down in the usual order (about one run in five), so the
    streams are flushed and the process ends without it.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's notes off the screen; its errors are raised, not logged."""
    import logging

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _inside_batch_script(rank_variable: str) -> bool:
    """Tell whether SLURM's variables describe a batch script's own shell, not a task of srun."""
    return rank_variable == "SLURM_PROCID" and "SLURM_STEP_ID" not in os.environ


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _interface_towards(address: str) -> str | None:
    """Return the network interface the route to an address leaves by; None where that cannot be told.

    gloo otherwise takes the host name's address, which Debian and Ubuntu put on 127.0.1.1.
    """
    import psutil

    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
        if own.startswith("127."):
            return "lo"
        for name, entries in psutil.net_if_addrs().items():
            if any(entry.address == own for entry in entries):
                return str(name)
    return None


def _give_every_group(timeout: timedelta) -> None:
    """Make `timeout` the default of new process groups: DeepSpeed makes its own without one."""
    import functools

    import torch.distributed

    global _group_timeout
    first, _group_timeout = _group_timeout is None, timeout
    if not first:
        return
    make = torch.distributed.new_group

    @functools.wraps(make)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = _group_timeout
        return make(*args, **kwargs)

    torch.distributed.new_group = new_group
