"""The configuration given to DeepSpeed: ours, with a user's own JSON on top; needs no torch.

Source of the recommendations: DeepSpeed 0.19 (what makes a step wait for the device is switched off).
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mnemos.engine.settings import Settings
from mnemos.sharding.errors import UserError

_OURS = {  # keys of a DeepSpeed configuration that a setting of ours decides
    "train_batch_size": "training.batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.micro_batch",
    "optimizer": "training.base_lr, training.weight_decay, training.beta1 and training.beta2",
    "scheduler": "training.warmup and training.epochs",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "gradient_clipping": "nothing: the recipe clips no gradients",
}


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Return a user's DeepSpeed configuration.

    Raises:
        UserError: unreadable, no JSON object, or it sets what a setting of ours decides.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--deepspeed_config {path}: cannot be read ({error.strerror}); name a JSON file"
        ) from None
    except ValueError as error:
        raise UserError(
            f"--deepspeed_config {path}: is not JSON ({error}); see deepspeed.ai for the format"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: holds a {type(config).__name__}; an object is needed")
    for key, setting in _OURS.items():
        if key in config:
            raise UserError(
                f"--deepspeed_config {path}: sets {key!r}, which is decided by {setting}; remove it there"
            )
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"--deepspeed_config {path}: 'zero_optimization' is {zero!r}; an object is needed, such as {{\"stage\": 2}}"
        )
    stage = zero.get("stage", 1)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed_config {path}: ZeRO stage {stage!r} is unknown; choose 0, 1, 2 or 3")
    return config


def check_with_deepspeed(settings: Settings, user: dict[str, Any], world_size: int) -> None:
    """Refuse entries that DeepSpeed itself does not take, before anything is begun; imports DeepSpeed.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    config = deepspeed_config(
        settings, bf16=False, micro_batch=settings.training.batch // world_size, accumulate=1, user=user
    )
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"--deepspeed_config: DeepSpeed refuses {place}={first['input']!r} ({first['msg']}); correct or remove it"
        ) from None
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"--deepspeed_config: DeepSpeed refuses it ({error}); correct that entry, see deepspeed.ai"
        ) from None


def zero_stage(settings: Settings, user: dict[str, Any] | None, world_size: int) -> int:
    """Return the ZeRO stage: the user's DeepSpeed configuration decides before `parallel.zero`.

    One rank has nothing to divide: unless that configuration is about ZeRO, 1 and 2 mean 0 there. DeepSpeed would copy
    every gradient twice and do no more.
    """
    asked: dict[str, Any] = (user or {}).get("zero_optimization", {})
    stage: int = asked.get("stage", settings.parallel.zero)
    return 0 if world_size == 1 and stage in (1, 2) and not asked else stage


def deepspeed_config(
    settings: Settings, *, bf16: bool, micro_batch: int, accumulate: int, user: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the configuration given to DeepSpeed: ours, with the user's entries on top."""
    world_size = settings.training.batch // (micro_batch * accumulate)
    stage = zero_stage(settings, user, world_size)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        # one rank sends its gradients nowhere and needs no buffer to send them from
        "contiguous_gradients": stage != 1 or world_size > 1,
    }
    if stage in (1, 2):
        # nothing reads the norm, and computing it would wait for the device every step
        zero["compute_grad_norm"] = False
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0 if settings.model.width < 512 else 100_000
    config: dict[str, Any] = {
        "train_batch_size": settings.training.batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "log_level": "error",
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device every step
    }
    if bf16 and stage == 0:  # DeepSpeed sees fp32 masters; what travels between ranks is bf16 all the same
        config["communication_data_type"] = "bf16"
    elif bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    for key, value in (user or {}).items():
        if key == "zero_optimization":
            zero |= value
        else:
            config[key] = value
    if stage or "zero_optimization" in (user or {}):
        config["zero_optimization"] = zero
    return config
