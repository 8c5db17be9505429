"""Do a plan: stage by stage, train, close, record; then print the table of the stages."""

import sys
import time
from typing import Any

import torch

from mnemos.engine import dist
from mnemos.engine.closing import close_stage
from mnemos.engine.curriculum import Plan, Stage, settings_text
from mnemos.engine.deepspeed_config import check_with_deepspeed, zero_stage
from mnemos.engine.encoder import Encoder, block_parameters
from mnemos.engine.estimates import (
    choose_micro_batch,
    free_memory,
    matrix_rate,
    parameters_by_part,
    sample_bytes,
    sizes,
    stage_seconds,
    state_bytes,
)
from mnemos.engine.objectives import Pretrainer
from mnemos.engine.parallel import computes_in_bf16
from mnemos.engine.plain_table import format_table
from mnemos.engine.rehearsal.budget import buffer_sizes
from mnemos.engine.rehearsal.buffer_pictures import FRAGMENT
from mnemos.engine.rehearsal.kmeans import choose_backend
from mnemos.engine.run_directory import RunDirectory
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_model import encoder_shape
from mnemos.engine.stage_training import StageTraining
from mnemos.engine.stopping import BadNumbers, Stopped
from mnemos.kernels.attention import attention
from mnemos.kernels.packing import Packing
from mnemos.sharding.command import BAD_DATA, TRY_AGAIN, USER_MISTAKE
from mnemos.sharding.errors import DataError, StoreError, UserError

_PATIENCE_S = 5.0  # of other ranks, while rank 0 tells


def run_plan(plan: Plan) -> int:
    """Do the plan on all ranks and return the exit code; collective."""
    dist.meet(plan.settings.parallel.timeout_s)
    run = RunDirectory(plan.run)
    try:
        if plan.deepspeed is not None:
            check_with_deepspeed(plan.settings, plan.deepspeed, dist.world_size())
        _check_attention(plan)
        choose_backend(plan.settings.buffer.backend)
        sizes = dist.on_main(lambda: buffer_sizes(plan))
        if dist.is_main():
            print(describe_plan(plan, sizes), flush=True)
        if plan.dry_run:
            return 0
        dist.on_main(lambda: _begin(run, plan))
        for stage in plan.todo:
            _do_stage(run, plan, stage)
    except Stopped:
        _tell("stopped and saved; start the same command again to go on")
        return TRY_AGAIN
    except BadNumbers as error:  # every rank sees the same losses
        _tell(f"error: {error}")
        return BAD_DATA
    except StoreError as error:
        print(
            f"error: rank {dist.rank()}: {error}; start the same command again", file=sys.stderr, flush=True
        )
        return TRY_AGAIN
    except DataError as error:  # the rank that met the broken sample tells; the launcher ends the others
        print(
            f"error: rank {dist.rank()}: {error}; mend or rebuild that shard set", file=sys.stderr, flush=True
        )
        return BAD_DATA
    except UserError as error:
        _tell(f"error: {error}")
        return USER_MISTAKE
    if dist.is_main():
        print("\n" + stage_table(run), flush=True)
        last = plan.stages[-1]
        print(
            f"\nencoder: {last.directory}\npictures: {last.directory / 'reconstructions'}\n"
            f"buffer: {last.directory / FRAGMENT}",
            flush=True,
        )
    dist.barrier()
    return 0


def _check_attention(plan: Plan) -> None:
    """Try an attention backend that was asked for by name on one token of each sort the plan has.

    Raises:
        UserError: it cannot take them, or its package is missing.
    """
    settings, device = plan.settings, dist.device()
    model, backend = settings.model, settings.training.attention
    if backend == "auto":
        return
    dtype = torch.bfloat16 if computes_in_bf16(settings.training.precision) else torch.float32
    dense, packed = None, Packing.from_lengths([1], device)
    sorts: set[tuple[int, Packing | None]] = set()
    for stage in plan.stages:
        sorts.add((model.width // model.heads, packed if stage.manifest.kind == "text" else dense))
        if stage.manifest.kind != "text":
            sorts.add((model.decoder_width // model.decoder_heads, dense))
    for width, packing in sorts:
        token = torch.zeros(1, 1, 3, 1, width, device=device, dtype=dtype, requires_grad=True)
        try:
            attention(token, packing=packing, backend=backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"training.attention={backend}: {error}, or leave the setting at auto") from None


def _begin(run: RunDirectory, plan: Plan) -> None:
    run.create(plan.settings)
    known = [entry["name"] for entry in run.ledger()["stages"]]
    order = [stage.name for stage in plan.stages]
    later = [name for name in (*plan.settings.curriculum.stages, *known) if name not in order]
    run.set_stages(
        [*order, *dict.fromkeys(later)], plan.data if isinstance(plan.data, str) else plan.data.resolve()
    )


def _do_stage(run: RunDirectory, plan: Plan, stage: Stage) -> None:
    """Bring one stage from where it stands to complete."""
    if stage.status in ("pending", "training"):
        dist.on_main(lambda: run.record(stage.name, status="training", data=stage.manifest.fingerprint))
        shown = StageTraining(plan, stage).run()
        facts = {
            **shown,
            "zero": zero_stage(plan.settings, plan.deepspeed, dist.world_size()),
            "ranks": dist.world_size(),
        }
        dist.on_main(lambda: run.record(stage.name, status="trained", **facts))
    begun = time.monotonic()
    kept = close_stage(plan, stage)
    facts = {**kept, "closing_seconds": round(time.monotonic() - begun, 1)}
    dist.on_main(lambda: run.record(stage.name, status="complete", **facts))


def stage_table(run: RunDirectory) -> str:
    """Return the closing table: one line a stage of the run."""
    entries: list[dict[str, Any]] = run.ledger()["stages"]
    complete = [entry for entry in entries if entry["status"] == "complete"]
    final_drift = complete[-1].get("drift", {}) if complete else {}
    rows = []
    for entry in entries:
        measured = entry.get("validation", {})
        without = measured.get("constant", measured.get("unigram"))
        rows.append(
            {
                "stage": entry["name"],
                "status": entry["status"],
                "samples": entry.get("samples"),
                "pretext": entry.get("pretext_steps"),
                "rehearsal": entry["steps"] - entry["pretext_steps"] if "steps" in entry else None,
                "loss": _fixed(measured.get("loss")),
                "without": _fixed(without),
                "ratio": _fixed(measured.get("ratio"), 2),
                "bigram": _fixed(measured.get("bigram")),
                "buffer": entry.get("buffer"),
                "drift": _fixed(final_drift.get(entry["name"])),
                "minutes": _fixed(
                    (entry.get("seconds", 0) + entry.get("closing_seconds", 0)) / 60 or None, 1
                ),
            }
        )
    headings = {
        "stage": "stage",
        "status": "status",
        "samples": "samples",
        "pretext": "updates",
        "rehearsal": "+ rehearsal",
        "loss": "val loss",
        "without": "no model",
        "ratio": "ratio",
        "bigram": "bigram",
        "buffer": "buffer",
        "drift": "drift",
        "minutes": "min",
    }
    legend = (
        "no model: loss of the best constant predictor (texts: unigram entropy); ratio: val loss / no model;\n"
        "drift: squared change of held-out features since the modality's own stage, in units of their variance"
    )
    return format_table(rows, headings) + "\n" + legend


def describe_plan(plan: Plan, kept: dict[str, int]) -> str:
    """Return the plan as text: what is done, with what model, and estimates of memory and time.

    Args:
        kept: most samples of each stage's buffer.
    """
    settings, device, world = plan.settings, dist.device(), dist.world_size()
    bf16 = computes_in_bf16(settings.training.precision)
    shape = encoder_shape(plan)
    with torch.device("meta"):
        encoder = Encoder(shape)
        model = Pretrainer(encoder, settings)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    rate = matrix_rate(device, bf16=bf16)
    zero = zero_stage(settings, plan.deepspeed, world)
    rows = []
    for stage in plan.stages:
        row: dict[str, object] = {
            "stage": stage.name,
            "status": stage.status,
            "samples": stage.manifest.splits["train"].samples,
        }
        if stage in plan.todo:
            buffers = tuple(kept[earlier.name] for earlier in plan.rehearsed(stage))
            schedule = plan.schedule(stage, buffers)
            free = free_memory(device)
            micro = choose_micro_batch(
                plan, stage, shape, parameters=total, bf16=bf16, world=world, free_bytes=free
            )
            memory = state_bytes(total, bf16=bf16, zero=zero, world=world) + micro * sample_bytes(
                sizes(stage, shape, settings), settings, bf16=bf16
            )
            seconds = stage_seconds(plan, stage, shape, buffers, rate=rate, device=device.type, world=world)
            row |= {
                "updates": schedule.steps_of(CURRENT),
                "rehearsal": schedule.num_steps - schedule.steps_of(CURRENT),
                "micro": f"{micro} x {settings.training.batch // world // micro} x {world}",
                "memory": f"{memory / 1e9:.2f} GB",
                "time": f"{seconds / 60:.1f} min",
            }
        rows.append(row)
    headings = {
        "stage": "stage",
        "status": "status",
        "samples": "samples",
        "updates": "updates",
        "rehearsal": "+ rehearsal",
        "micro": "batch",
        "memory": "memory a rank",
        "time": "training",
    }
    threads = torch.get_num_threads()
    lines = [
        f"run {plan.run}, preset {settings.preset}, strategy {settings.rehearsal.strategy}, seed {settings.training.seed}",
        f"{world} rank{'s' if world > 1 else ''} on {_device_name(device)}, {'bf16' if bf16 else 'fp32'}, ZeRO {zero}, "
        + f"{threads} thread{'s' if threads > 1 else ''} a rank",
        f"encoder blocks {_millions(block_parameters(list(encoder.blocks)))}, whole model {_millions(total)}: "
        + ", ".join(f"{part} {_millions(count)}" for part, count in parts.items()),
        "",
        format_table(rows, headings),
        "batch: micro-batch x accumulation x ranks; memory and time are estimates",
    ]
    if plan.dry_run:
        lines += ["", "settings:", settings_text(settings)]
    if not plan.todo:
        lines += ["", "nothing to do: all these stages are complete"]
    return "\n".join(lines) + "\n"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (gloo)"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _fixed(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _tell(message: str) -> None:
    """Print a message on rank 0; the others give it time, because a launcher ends all ranks when the first one leaves."""
    if dist.is_main():
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_S)
