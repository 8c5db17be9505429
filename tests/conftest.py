"""Run Triton through its interpreter when there is no GPU, poison uninitialised memory, make tiny data once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first kernel import


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny shard set of every modality; read only."""
    from tiny_data import make_tiny_sets

    return make_tiny_sets(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Make torch.empty return NaN, so that code that skips an output element fails its test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what turns the fill on
    yield
    torch.use_deterministic_algorithms(before)
