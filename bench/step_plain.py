"""The engine without its kernels: every kernel's public function replaced by its definition in plain PyTorch.

A custom operation is opaque to a compiler, so it is not its device code that is exchanged but the function the engine
calls: what remains are PyTorch's own operations, which torch.compile may fuse as it likes. Attention stays as it is: its
backends are PyTorch's, or packages' that a user chooses.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mnemos.kernels._common.launch import launch_counts

Definition = Callable[..., Any]


class KernelRan(Exception):
    """One of our operations ran where none should."""


def _random_patch_ids(module: Any) -> Definition:
    return lambda place_B, num, visible, *, key: module.random_patch_ids_reference(place_B, num, visible, key)


def _gather_patches(module: Any) -> Definition:
    def plain(
        images: Any, ids: Any, *, patch: Any, channels: int, scale_B: Any, shift_B: Any, **more: Any
    ) -> Any:
        names, dtype = ("flip_BA", "partner_B", "weight_B"), more.get("dtype", scale_B.dtype)
        chosen = [more.get(name) for name in names]
        return module.gather_patches_reference(images, ids, patch, channels, scale_B, shift_B, *chosen, dtype)

    return plain


def _masked_patch_mse(module: Any) -> Definition:
    def plain(
        pred: Any, images: Any, ids: Any, *, patch: Any, channels: int, scale_B: Any, **more: Any
    ) -> Any:
        flip, factor = more.get("flip_BA"), more.get("factor")
        return module.masked_patch_mse_reference(
            pred, images, ids, patch, channels, scale_B, flip, factor=factor
        )

    return plain


def _with_prefix(name: str) -> Callable[[Any], Definition]:
    """Return the definition of an operation whose only keyword is `num_prefix`."""
    return lambda module: lambda *tensors, num_prefix=1: getattr(module, name)(*tensors, num_prefix)


def _residual_norm(module: Any) -> Definition:
    return lambda *arguments: module.layer_scale_residual_norm_reference(*arguments)[:2]


# File of kernels/ and its public function -> the definition with the same signature, given the module.
PLAIN: dict[str, Callable[[Any], Definition]] = {
    "feature_mse": lambda module: module.feature_mse_reference,
    "gather_patches": _gather_patches,
    "gather_tokens": lambda module: module.gather_tokens_reference,
    "layer_scale_residual_norm": _residual_norm,
    "linear": lambda module: F.linear,
    "masked_lm_loss": lambda module: module.masked_lm_loss_reference,
    "masked_patch_mse": _masked_patch_mse,
    "place_tokens": _with_prefix("place_tokens_reference"),
    "random_patch_ids": _random_patch_ids,
}


def definitions() -> dict[Definition, Definition]:
    """Return the plain definition of every public function there is."""
    found = {}
    for name, make in PLAIN.items():
        if find_spec(f"mnemos.kernels.{name}") is not None:
            module = import_module(f"mnemos.kernels.{name}")
            found[getattr(module, name)] = make(module)
    return found


@contextmanager
def plain_definitions(table: Mapping[Definition, Definition] | None = None) -> Iterator[None]:
    """Let every module of the engine call the definitions in place of the kernels, as a context.

    Raises:
        KernelRan: at the end, if device code was launched all the same.
    """
    table = definitions() if table is None else table
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("mnemos.engine.")]
    places = [
        (module, name, value)
        for module in modules
        for name, value in list(vars(module).items())
        if callable(value) and getattr(value, "__hash__", None) and value in table
    ]
    before = dict(launch_counts)
    try:
        for module, name, value in places:
            setattr(module, name, table[value])
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)
    launched = [name for name, count in launch_counts.items() if count != before.get(name, 0)]
    if launched:
        raise KernelRan(
            f"device code of {', '.join(launched)} was launched; give step_plain.PLAIN its definition"
        )


class OurOperations(TorchDispatchMode):
    """Write down which of our custom operations run, on any device; as a context, and in this thread alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mnemos":
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))
