"""Every setting of a run, checked when built. Precedence: defaults < preset < file < command line.

A setting is addressed by its dotted name (`training.batch`). "Free" settings may differ from call to call of the same
run, because they change where and how fast it is computed, never what; all others are written into the run once.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mnemos.engine.presets import PRESETS
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import DEFAULT_ORDER


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Section):
    """Sizes of the encoder and of the decoders that train it."""

    width: int = Field(768, ge=8, description="encoder width")
    depth: int = Field(12, ge=1, description="encoder blocks")
    heads: int = Field(12, ge=1, description="attention heads; must divide width")
    ffn: int = Field(3072, ge=8, description="hidden width of a block's feed-forward part")
    layer_scale: float = Field(1e-3, gt=0, description="initial LayerScale of every branch")
    drop_path: float = Field(0.1, ge=0, lt=1, description="chance that a branch is dropped for a sample")
    decoder_width: int = Field(512, ge=8, description="image decoder width")
    decoder_depth: int = Field(8, ge=1, description="image decoder blocks")
    decoder_heads: int = Field(16, ge=1, description="image decoder heads; must divide decoder_width")
    image_patch: int = Field(16, ge=1, description="edge of a square patch in pixels")
    volume_patch: int = Field(16, ge=1, description="edge of a cubic patch in voxels")
    text_positions: int = Field(512, ge=1, description="rows of the text position table")
    official: bool = Field(False, description="the MedCoSS authors' arithmetic, for weights in their format")

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        for width, heads, name in (
            (self.width, self.heads, "heads"),
            (self.decoder_width, self.decoder_heads, "decoder_heads"),
        ):
            if width % heads:
                raise ValueError(f"{name} {heads} does not divide the width {width}")
        return self


class TrainingSettings(_Section):
    """The recipe of a stage."""

    batch: int = Field(512, ge=1, description="global batch: samples of one update over all ranks")
    micro_batch: int = Field(
        0, ge=0, description="samples of one forward pass on one rank; 0: as memory allows"
    )
    epochs: float = Field(300, gt=0, description="passes over the current modality in a stage")
    steps: int = Field(0, ge=0, description="updates on the current modality in a stage; 0: epochs decides")
    base_lr: float = Field(1.5e-4, gt=0, description="learning rate per 256 samples of batch")
    warmup: float = Field(40 / 300, ge=0, lt=1, description="share of a stage's updates with rising rate")
    weight_decay: float = Field(0.05, ge=0, description="AdamW decay of matrices; none on 1-D parameters")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW decay of the mean squared gradient")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of patches hidden in images and volumes")
    word_ratio: float = Field(0.15, gt=0, lt=1, description="share of words predicted in texts")
    crop_area: float = Field(0.2, gt=0, le=1, description="least area of a random resized crop")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on a GPU or a CPU with bf16 instructions, else fp32"
    )
    attention: Literal["auto", "definition", "sdpa", "varlen", "xformers", "flex"] = Field(
        "auto", description="how attention is computed; auto: by the table of what was measured"
    )
    graphs: Literal["auto", "always", "never"] = Field(
        "auto", description="one CUDA graph for each set of images or volumes; auto: where it can be"
    )
    compile: bool = Field(
        False, description="blocks through torch.compile: minutes at the start, seldom a quicker step"
    )
    recompute: bool = Field(False, description="recompute activations in backward: less memory, more time")
    seed: int = Field(0, ge=0, description="of everything random")
    log_every: int = Field(20, ge=1, description="updates between two readings of the losses")
    validate_every: int = Field(200, ge=1, description="updates between two validation losses")
    checkpoint_every: int = Field(500, ge=1, description="updates between two checkpoints of a stage")
    shuffle_visible: bool = Field(
        False, description="control: visible patches come from another sample, so nothing can be inferred"
    )


class RehearsalSettings(_Section):
    """Training on the buffers of earlier stages."""

    strategy: Literal["medcoss", "sequential"] = Field(
        "medcoss", description="medcoss: buffers and feature distillation; sequential: nothing is kept"
    )
    weight: float = Field(1.0, ge=0, description="weight of the distillation loss")
    mixup: bool = Field(True, description="intra-modal mixup of rehearsed samples")
    mix_group: int = Field(
        16, ge=2, description="partners are drawn within runs of this many samples of a batch"
    )
    least_share: float = Field(
        0.0,
        ge=0,
        le=0.2,
        description="least share of a stage's updates for every earlier modality; 0: as the paper",
    )


class BufferSettings(_Section):
    """What is kept of a finished stage."""

    strategy: Literal["kmeans", "random", "herding"] = Field(
        "kmeans",
        description="how samples are chosen: kmeans (the nearest to each centre), random, or herding (those whose mean is "
        "the stage's)",
    )
    percent: float = Field(
        5.0, gt=0, le=100, description="most samples kept of a stage, in percent, above 0 to 100"
    )
    samples: int = Field(0, ge=0, description="most samples kept of a stage, as a number; 0: percent decides")
    per_cluster: int = Field(
        5,
        ge=1,
        description="samples kept of each cluster, the nearest to its centre; samples / per_cluster clusters are made",
    )
    iterations: int = Field(25, ge=1, description="most Lloyd steps of k-means")
    backend: Literal["auto", "faiss", "triton", "cuml"] = Field(
        "auto",
        description="what computes k-means: faiss on a CPU, triton or cuml on a GPU; auto: the best at hand",
    )
    budget_gb: float = Field(
        0.0, ge=0, description="most all buffers of a run may take on disk, in GB; 0: no bound"
    )
    precision: Literal["fp16", "fp32"] = Field("fp32", description="how embeddings are stored: fp16 or fp32")
    keep_embeddings: bool = Field(
        False, description="keep every sample's embedding of a closed stage, under stages/NAME/embedding"
    )


class CurriculumSettings(_Section):
    """The order of the stages."""

    stages: tuple[str, ...] = Field(
        DEFAULT_ORDER, min_length=1, description="modalities in order of training"
    )


class DataSettings(_Section):
    """How samples are read."""

    workers: int = Field(
        -1, ge=-1, description="reading processes a rank; -1: none on a CPU, up to four on a GPU"
    )
    streams: int = Field(
        16,
        ge=1,
        description="most canonical streams of a set: a batch takes as many samples from each, and a reader holds one shard "
        "of each",
    )
    max_bad: float = Field(
        0.01, ge=0, lt=1, description="share of a set's samples that may be broken; they are skipped and told"
    )
    cache: str = Field(
        "", description="folder for shards fetched from an object store; empty: ~/.cache/mnemos/shards"
    )
    cache_gb: float = Field(
        20.0, gt=0, description="most the shards in it may take, in GB; the oldest are removed"
    )
    pipe: bool = Field(
        False, description="allow --data pipe:COMMAND, which runs a shell command for each shard"
    )
    baseline_samples: int = Field(4096, ge=1, description="training samples behind the constant predictor")


class ParallelSettings(_Section):
    """How DeepSpeed divides the work."""

    zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage")
    timeout_s: int = Field(1800, ge=5, description="seconds a rank waits for the others")


class Settings(_Section):
    """All settings of a run."""

    preset: str = Field("sample", description="name of the preset the others start from")
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    rehearsal: RehearsalSettings = RehearsalSettings()
    buffer: BufferSettings = BufferSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    data: DataSettings = DataSettings()
    parallel: ParallelSettings = ParallelSettings()


FREE = {
    "training.micro_batch",
    "training.attention",
    "training.graphs",
    "training.compile",
    "training.recompute",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "buffer.backend",
    "buffer.budget_gb",  # the disk may grow in the course of a run
    "buffer.keep_embeddings",
    "data.workers",
    "data.max_bad",
    "data.cache",
    "data.cache_gb",
    "data.pipe",
    "parallel.zero",
    "parallel.timeout_s",
}


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def known_keys() -> list[str]:
    """Return the dotted names of all settings, in order."""
    return [f"{section}.{key}" for section, model in _sections().items() for key in model.model_fields]


def describe() -> str:
    """Return one line per setting: name, default and meaning."""
    lines = []
    for section, model in _sections().items():
        for key, field in model.model_fields.items():
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            lines.append(f"  {section}.{key:<18} {default!s:<10.28} {field.description}")
    return "\n".join(lines)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Return {"section.key": value} of a nested mapping of settings; an empty section has none."""
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        elif values is not None or section not in _sections():
            flat[str(section)] = values
    return flat


def read_file(path: Path) -> dict[str, Any]:
    """Return the flat settings of a YAML file given with --config.

    Raises:
        UserError: the file is missing, is no YAML or holds no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = str(error).splitlines()[0]
        raise UserError(
            f"--config {path}: is not YAML ({place}); write lines such as 'training: {{batch: 64}}'"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"--config {path}: holds a {type(tree).__name__}; write sections such as 'training: {{batch: 64}}'"
        )
    return flatten(tree)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return (key, value) of a `--set key=value` argument; the value is read as YAML.

    Raises:
        UserError: there is no "=" or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text!r}: has no key=value form; write for example --set training.batch=64")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(
            f"--set {text!r}: the value is not YAML; quote it, or write [a,b] for a list"
        ) from None


def _check_keys(flat: dict[str, Any]) -> None:
    allowed, sections = known_keys(), _sections()
    for key in flat:
        if key in sections:
            name = next(iter(sections[key].model_fields))
            raise UserError(
                f"setting {key!r} is a section, not a value; name one of its settings, such as {key}.{name}"
            )
        if key not in allowed and key != "preset":
            near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "--help lists all of them"
            raise UserError(f"unknown setting {key!r}; {hint}")


def resolve(preset: object, overrides: dict[str, Any]) -> Settings:
    """Build the settings of a preset with flat overrides on top.

    Args:
        preset: a name in `PRESETS`; whatever a user gave.
        overrides: dotted names to values; later sources already merged over earlier ones.

    Raises:
        UserError: an unknown preset, an unknown key, or a value out of range.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    _check_keys(overrides)
    tree: dict[str, Any] = {"preset": preset}
    for key, value in {**PRESETS[preset], **overrides, "preset": preset}.items():
        section, dot, name = key.partition(".")
        if dot:
            tree.setdefault(section, {})[name] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    """Return the first complaint: the setting with what came, what is allowed, what to do."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    name = ".".join(place[:2])
    came = f"={first['input']!r}" if len(place) > 1 else ""  # else the input is the whole section
    allowed = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    as_list = ", written as [a,b]" if first["type"] == "tuple_type" else ""
    return f"setting {name}{came}: {allowed}{as_list}; correct it, --help says what it means"


def as_flat(settings: Settings) -> dict[str, Any]:
    """Return the settings as {"section.key": plain value}."""
    return flatten(settings.model_dump(mode="json"))
