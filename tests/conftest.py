"""Run Triton through its interpreter when there is no GPU, poison uninitialised memory, make tiny data once."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch


def _let_device_scalars_bound_loops() -> None:
    """Mend the interpreter of Triton 3.6, which reads a scalar in a way NumPy refuses since 2.4; 3.7 reads it so."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # the scope puts the first one back

    interpreter._patch_lang_tensor = mended


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first kernel import
    if version("triton").startswith("3.6."):
        _let_device_scalars_bound_loops()


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
