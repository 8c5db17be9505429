"""Who we are among the ranks, whatever started us."""

import json
import os
import subprocess
import sys

import pytest

from mnemos.engine import dist

NAMES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_ID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "TORCH_CPP_LOG_LEVEL",
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as if nobody had launched us; whatever a test sets is taken back."""
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if name not in NAMES}
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}, (5, 6, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 2, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, (1, 4, 1)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            (1, 2, 1),
        ),
    ],
    ids=[
        "nobody",
        "torchrun",
        "no local rank",
        "srun",
        "a batch script itself",
        "mpirun",
        "intel mpi",
        "inside slurm",
    ],
)
def test_rank_variables_of_every_launcher(variables: dict[str, str], expected: tuple[int, int, int]) -> None:
    os.environ.update(variables)
    dist.adopt_environment()
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == expected
    assert dist.is_main() == (expected[0] == 0)
    assert os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"]) > 0


def test_a_lone_rank_takes_a_free_port_and_others_the_agreed_one() -> None:
    dist.adopt_environment()
    alone = os.environ.pop("MASTER_PORT")
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    dist.adopt_environment()
    assert os.environ["MASTER_PORT"] == "29500" != alone
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_ranks_of_this_machine() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="8")
    assert dist.local_world_size() == 8
    os.environ["LOCAL_SIZE"] = "4"  # deepspeed's launcher
    assert dist.local_world_size() == 4
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # torchrun
    assert dist.local_world_size() == 2


def test_a_refusal_is_shared() -> None:
    dist.adopt_environment()

    def refuse() -> int:
        raise SystemExit(2)

    assert dist.share(refuse) == dist.Refusal(2)
    assert dist.share(lambda: 7) == 7


def test_one_timeout_reaches_every_group_and_may_be_changed() -> None:
    probe = """
import json, torch
from mnemos.engine import dist
dist.adopt_environment()
found = []
for seconds in (100, 7):
    dist.meet(seconds)
    for group in (torch.distributed.group.WORLD, torch.distributed.new_group([0])):
        found.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
print(json.dumps(found), flush=True)
dist.leave(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", probe],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [100, 100, 7, 7]
