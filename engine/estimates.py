"""Parameters, memory and time of a stage before it runs: models, not measurements, and labelled so on the screen."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from mnemos.engine import dist
from mnemos.engine.curriculum import Plan, Stage
from mnemos.engine.deepspeed_config import zero_stage
from mnemos.engine.encoder import EncoderShape
from mnemos.engine.optimizer import part_of
from mnemos.engine.patches import patch_grid
from mnemos.engine.settings import Settings

_EFFICIENCY = {"cpu": 0.35, "cuda": 0.30}  # of the matrix rate measured below; small layers reach no more


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens of one sample: what the encoder sees, what the decoder sees, what is predicted, in the pretext phase."""

    encoder: int
    decoder: int
    predicted: int
    values: int  # of one prediction


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Return the number of values in the parameters of each part of a `Pretrainer`."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    return counts


def sizes(stage: Stage, shape: EncoderShape, settings: Settings) -> Sizes:
    """Return the token counts of a stage's samples."""
    manifest = stage.manifest
    if manifest.kind == "text":
        length = manifest.shape[0]
        return Sizes(
            encoder=length,
            decoder=0,
            predicted=round(settings.training.word_ratio * length),
            values=shape.vocab,
        )
    edge = shape.image_patch if manifest.kind == "image" else shape.volume_patch
    patches = math.prod(patch_grid(manifest.shape, (edge,) * len(manifest.shape)))
    visible = max(1, int((1 - settings.training.mask_ratio) * patches))
    values = edge**2 * shape.channels if manifest.kind == "image" else edge**3
    return Sizes(encoder=1 + visible, decoder=1 + patches, predicted=patches - visible, values=values)


def step_flops(size: Sizes, settings: Settings, phase: str) -> float:
    """Return the floating-point operations of one sample's update (2 per multiply-add; backward counts twice)."""
    model = settings.model
    encoder = model.depth * _block_flops(size.encoder, model.width, model.ffn)
    if phase == "rehearsal":
        return 4 * encoder  # the student's forward and backward, the teacher's forward
    width = model.decoder_width if size.decoder else model.width
    decoder = model.decoder_depth * _block_flops(size.decoder, width, 4 * width) if size.decoder else 0.0
    return 3 * (encoder + decoder + 2 * size.predicted * width * size.values)


def sample_bytes(size: Sizes, settings: Settings, *, bf16: bool) -> int:
    """Return the activation bytes one sample of a micro-batch keeps for backward."""
    model, element = settings.model, 2 if bf16 else 4
    kept = 2 if settings.training.recompute else model.depth * (12 + 3 * model.ffn / model.width)
    encoder = size.encoder * model.width * kept
    decoder = size.decoder * model.decoder_width * model.decoder_depth * (12 + 12)
    return int(element * (encoder + decoder + 4 * size.predicted * size.values))


def state_bytes(parameters: int, *, bf16: bool, zero: int, world: int) -> int:
    """Return the bytes of weights, gradients and optimiser state on one rank."""
    weights, gradients, optimizer = (2, 2, 12) if bf16 else (4, 4, 8)
    if bf16 and zero == 0:  # fp32 masters with a bf16 copy
        weights, gradients, optimizer = (6, 4, 8)
    part = 1 / world
    share = {0: (1, 1, 1), 1: (1, 1, part), 2: (1, part, part), 3: (part, part, part)}[zero]
    return int(parameters * (weights * share[0] + gradients * share[1] + optimizer * share[2]))


def choose_micro_batch(
    plan: Plan, stage: Stage, shape: EncoderShape, *, parameters: int, bf16: bool, world: int, free_bytes: int
) -> int:
    """Return the samples one rank computes at a time: the setting, or the most that the memory estimate allows."""
    training = plan.settings.training
    if training.micro_batch:
        return training.micro_batch
    share, group = training.batch // world, plan.settings.rehearsal.mix_group
    mixes = bool(plan.rehearsed(stage)) and plan.settings.rehearsal.mixup
    state = state_bytes(
        parameters, bf16=bf16, zero=zero_stage(plan.settings, plan.deepspeed, world), world=world
    )
    members = (stage, *plan.rehearsed(stage))
    each = max(
        sample_bytes(sizes(member, shape, plan.settings), plan.settings, bf16=bf16) for member in members
    )
    room = max(1, int((0.7 * free_bytes - state) / each))
    allowed = [
        size
        for size in range(1, share + 1)
        if share % size == 0 and not (size % group and (mixes or training.shuffle_visible))
    ]
    return max((size for size in allowed if size <= room), default=allowed[0])


def free_memory(device: torch.device) -> int:
    """Return the bytes this rank may fill: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available) // dist.local_world_size()


def matrix_rate(device: torch.device, *, bf16: bool) -> float:
    """Return the rate of a plain matrix product on this device in FLOP/s, measured for a tenth of a second."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    edge = 4096 if device.type == "cuda" else 512
    left = torch.randn(edge, edge, device=device, dtype=dtype)
    right = torch.randn(edge, edge, device=device, dtype=dtype)
    products = 0
    left @ right
    _wait(device)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.1:
        for _ in range(4):
            left @ right
        _wait(device)
        products += 4
    return 2 * edge**3 * products / (time.perf_counter() - start)


def stage_seconds(
    plan: Plan,
    stage: Stage,
    shape: EncoderShape,
    buffer_sizes: tuple[int, ...],
    *,
    rate: float,
    device: str,
    world: int,
) -> float:
    """Return a rough estimate of a stage's training time."""
    schedule = plan.schedule(stage, buffer_sizes)
    members = (stage, *plan.rehearsed(stage))
    flops = sum(
        schedule.steps_of(number)
        * plan.settings.training.batch
        * step_flops(sizes(member, shape, plan.settings), plan.settings, "rehearsal" if number else "pretext")
        for number, member in enumerate(members)
    )
    return flops / (rate * _EFFICIENCY[device] * (world if device == "cuda" else 1))


def _block_flops(tokens: int, width: int, ffn: int) -> float:
    return tokens * (8 * width**2 + 4 * width * ffn + 4 * tokens * width)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
