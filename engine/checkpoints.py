"""Checkpoints of a stage under way: written beside the last one, renamed, then pointed to.

DeepSpeed's own `latest` is written before the other ranks' files are whole, so it is not used: the pointer here is
replaced after every rank has written, and the checkpoint before is removed only then.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnemos.engine import dist
from mnemos.engine.parallel import Engine
from mnemos.engine.run_directory import write_atomically
from mnemos.sharding.errors import UserError

_POINTER = "current.json"


def save_checkpoint(folder: Path, engine: Engine, step: int, taken: dict[str, int]) -> None:
    """Write a checkpoint of `step` finished updates; collective.

    Args:
        folder: of the stage's checkpoints.
        engine: whose state is saved.
        step: finished updates.
        taken: samples taken of each set, by modality: the whole state of the data.
    """
    name = f"step-{step:08d}"
    with dist.quiet():
        engine.engine.save_checkpoint(str(folder), tag=f"{name}.partial", save_latest=False)

    def publish() -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / f"{name}.partial").rename(folder / name)
        pointer = {
            "step": step,
            "name": name,
            "world_size": dist.world_size(),
            "zero": engine.stage,
            "bf16": engine.bf16,
            "layout": engine.layout,
            "taken": taken,
        }
        write_atomically(folder / _POINTER, json.dumps(pointer) + "\n")
        for old in folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    dist.barrier()
    dist.on_main(publish)


def restore_checkpoint(folder: Path, engine: Engine, taken: Callable[[int], dict[str, int]]) -> int:
    """Load the last checkpoint, if there is one, and return its finished updates (0 without); collective.

    Args:
        folder: of the stage's checkpoints.
        engine: that is restored.
        taken: the samples this start would have taken of each set after a number of updates.

    Raises:
        UserError: it was written by another version, number of ranks, ZeRO stage or precision, with other data, or it is
            damaged.
    """
    pointer: dict[str, Any] | None = dist.on_main(lambda: _read_pointer(folder))
    if pointer is None:
        return 0
    if "layout" not in pointer:
        raise UserError(
            f"the checkpoint {folder / pointer['name']} was written by another version of mnemos, whose parameters lie "
            f"otherwise; finish the stage with that version, or remove {folder} to begin the stage again"
        )
    now = {
        "world_size": dist.world_size(),
        "zero": engine.stage,
        "bf16": engine.bf16,
        "layout": engine.layout,
    }
    other = {key: pointer[key] for key in now if pointer[key] != now[key]}
    if other:
        raise UserError(
            f"the checkpoint {folder / pointer['name']} was written with {other}, this start has "
            f"{ {key: now[key] for key in other} }; go on as it was begun, or remove {folder} to begin the stage again"
        )
    step: int = pointer["step"]
    if pointer["taken"] != taken(step):
        raise UserError(
            f"the checkpoint {folder / pointer['name']} had taken {pointer['taken']} samples after {step} updates, this start "
            f"would have taken {taken(step)}: batch, stages or buffers are others; go on as it was begun, or remove {folder} "
            "to begin the stage again"
        )
    with dist.quiet():
        loaded, _ = engine.engine.load_checkpoint(
            str(folder), tag=pointer["name"], load_lr_scheduler_states=False
        )
    assert loaded is not None, f"DeepSpeed found no checkpoint {pointer['name']} in {folder}"
    return step


def remove_checkpoints(folder: Path) -> None:
    """Remove a finished stage's checkpoints; its weights are in `encoder.safetensors`."""
    shutil.rmtree(folder, ignore_errors=True)


def _read_pointer(folder: Path) -> dict[str, Any] | None:
    try:
        pointer: dict[str, Any] = json.loads((folder / _POINTER).read_text(encoding="utf-8"))
        known = {"step", "name", "world_size", "zero", "bf16", "taken"} <= pointer.keys()
        sound = known and (folder / pointer["name"]).is_dir()
    except OSError:
        return None
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"{folder / _POINTER} is damaged, or the checkpoint it names is gone; remove {folder} to begin the stage again"
        )
    return pointer
