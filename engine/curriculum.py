"""What is to be done: settings, data and ledger become a plan, checked before anything is computed.

Runs on rank 0 alone, without torch. Make semantics: a finished stage is never done again, a missing one before the
asked stage is done first.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemos.engine.arguments import Arguments, as_root
from mnemos.engine.data_root import find_shard_sets, store_options
from mnemos.engine.run_directory import CARD, WEIGHTS, RunDirectory, Status
from mnemos.engine.settings import Settings, as_flat, resolve
from mnemos.engine.slots import Schedule
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import FORMAT, MANIFEST_FILE, Manifest, load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER, STORED_SIZES
from mnemos.sharding.stores.storage import StoreOptions, open_store

BUFFER = "buffer"
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a plan.

    Attributes:
        number: from 1.
        directory: the stage's folder in the run.
        data: its shard set, a folder or an URL; None for a finished stage whose data is no longer there.
        manifest: of the data, or of the buffer where the data is gone.
        status: as the ledger has it.
    """

    number: int
    name: str
    directory: Path
    data: Path | str | None
    manifest: Manifest
    status: Status

    @property
    def buffer(self) -> Path:
        """Folder of the buffer kept of this stage."""
        return self.directory / BUFFER


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What this call will do.

    Attributes:
        run: the run's folder.
        stages: all stages up to the asked one.
        todo: those to be done now.
        data: folder (or URL) with the shard sets.
        deepspeed: the user's DeepSpeed configuration.
        dry_run: print and stop.
    """

    run: Path
    settings: Settings
    stages: tuple[Stage, ...]
    todo: tuple[Stage, ...]
    data: Path | str
    deepspeed: dict[str, Any] | None
    dry_run: bool

    @property
    def store(self) -> StoreOptions:
        """How object stores are read."""
        return store_options(self.settings)

    def earlier(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the stages before one."""
        return self.stages[: stage.number - 1]

    def rehearsed(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the stages whose buffers are rehearsed in one."""
        return self.earlier(stage) if self.settings.rehearsal.strategy == "medcoss" else ()

    def schedule(
        self, stage: Stage, buffer_sizes: tuple[int, ...], shards: tuple[tuple[int, ...], ...] = ()
    ) -> Schedule:
        """Return the stage's updates, given the sizes of the rehearsed buffers, and the samples by shard of all sets."""
        training = self.settings.training
        size = stage.manifest.splits["train"].samples
        per_epoch = max(1, size // training.batch)
        return Schedule(
            sizes=(size, *buffer_sizes),
            batch=training.batch,
            pretext_steps=training.steps or max(1, round(training.epochs * per_epoch)),
            least_share=self.settings.rehearsal.least_share,
            seed=training.seed,
            stage=stage.name,
            shards=shards,
            streams=self.settings.data.streams,
        )


def make_plan(arguments: Arguments, world_size: int) -> Plan:
    """Check everything that can be checked before computing, and return what is to be done.

    Creates or moves nothing except, at first use, the sample shards.

    Raises:
        UserError: a mistake in flags, data, or a contradiction with the run.
    """
    run = RunDirectory(arguments.run or Path("runs") / (arguments.preset or "sample"))
    run.check()
    begun = run.exists and not arguments.fresh
    if begun:
        settings = run.settings(arguments.preset, arguments.overrides)
    else:
        settings = resolve(arguments.preset or "sample", arguments.overrides)
    deepspeed = None
    if arguments.deepspeed_config is not None:
        from mnemos.engine.deepspeed_config import read_deepspeed_config

        deepspeed = read_deepspeed_config(arguments.deepspeed_config)
    ledger = run.ledger() if begun else {"stages": []}
    known = {entry["name"]: entry for entry in ledger["stages"]}
    _check_batches(settings, world_size)
    data = arguments.data or (as_root(ledger["data"]) if "data" in ledger else None)
    if data is None:
        _stage_names(arguments.stage, settings, known, DEFAULT_ORDER)  # a wrong name makes no sample shards
        data = _default_data(settings)
    asked = (*settings.curriculum.stages, *known, arguments.stage)
    sets = find_shard_sets(data, asked, store_options(settings))
    names = _stage_names(arguments.stage, settings, known, sets)
    stages = []
    for number, name in enumerate(names, start=1):
        entry = known.get(name, {"status": "pending"})
        stages.append(_stage(run, number, name, entry, sets, settings))
    todo = [stage for stage in stages if stage.status != "complete"]
    if arguments.only:
        missing = [stage.name for stage in todo if stage.name != arguments.stage]
        if missing:
            raise UserError(
                f"--only {arguments.stage}: the stages before it are not complete ({', '.join(missing)}); do them first "
                "with --stage, or drop --only"
            )
    plan = Plan(
        run=run.path,
        settings=settings,
        stages=tuple(stages),
        todo=tuple(todo),
        data=data if isinstance(data, str) else next(iter(sets.values())).parent,
        deepspeed=deepspeed,
        dry_run=arguments.dry_run,
    )
    for stage in todo:
        plan.schedule(stage, (1,) * len(plan.rehearsed(stage))).check()
        for earlier in plan.rehearsed(stage):
            if earlier not in todo:
                load_manifest(earlier.buffer)  # refuses a buffer that was lost
    return plan


def _default_data(settings: Settings) -> Path:
    """Return the sample shards' folder, made at first use; only the sample preset has data of its own."""
    if settings.preset != "sample":
        raise UserError(
            f"preset {settings.preset} has no data of its own; name your shard sets with --data DIR, or use --preset sample"
        )
    root = REPOSITORY if (REPOSITORY / "data_shards").is_dir() else Path()
    folder = root / "data_shards" / "sample"
    if not folder.exists():
        from mnemos.sharding.synthetic.make import make_sample_shards

        print(f"making the sample shards under {folder} (once, about 20 seconds)", flush=True)
        make_sample_shards(folder)
    older = [
        path for path in folder.glob(f"*/{MANIFEST_FILE}") if f'"{FORMAT}"' not in path.read_text("utf-8")
    ]
    if older:
        raise UserError(
            f"{folder} holds sample shards of an older version; remove that folder and give the command again, which makes new ones"
        )
    return folder


def _stage_names(asked: str, settings: Settings, known: Collection[str], sets: Collection[str]) -> list[str]:
    """Return the stages up to the asked one: the settings' order, then what was appended to the run."""
    order = list(settings.curriculum.stages)
    if len(set(order)) != len(order):
        raise UserError(f"curriculum.stages names a stage twice: {', '.join(order)}; name each once")
    order += [name for name in known if name not in order]
    if asked not in order:
        if asked not in sets:
            raise UserError(
                f"unknown stage {asked!r}; this run's stages are {', '.join(order)}; name one of them, or add a shard "
                "set of that modality to the data, which appends it"
            )
        order.append(asked)
    return order[: order.index(asked) + 1]


def _stage(
    run: RunDirectory,
    number: int,
    name: str,
    entry: dict[str, Any],
    sets: dict[str, Any],
    settings: Settings,
) -> Stage:
    directory = run.stage(number, name)
    data = sets.get(name)
    if data is None and entry["status"] != "complete":
        raise UserError(
            f"stage {name} has no data: none of {', '.join(sets) or 'the sets'} holds that modality; add its shard set, or "
            "choose the stages with --set curriculum.stages=[...]"
        )
    if entry["status"] in ("trained", "complete"):
        lost = [file for file in (WEIGHTS, CARD) if not (directory / file).exists()]
        if lost:
            raise UserError(
                f"{directory}: the ledger calls stage {name} {entry['status']}, but {' and '.join(lost)} "
                f"{'is' if len(lost) == 1 else 'are'} missing; restore the folder, or start over with --fresh"
            )
    place = data if data is not None else directory / BUFFER
    manifest = load_manifest(open_store(place, store_options(settings)))
    _check_size(manifest, settings, data or directory)
    _check_model(manifest, settings)
    fingerprint = entry.get("data")
    if data is not None and fingerprint not in (None, manifest.fingerprint):
        raise UserError(
            f"stage {name} was {entry['status']} with other data (fingerprint {fingerprint[:12]}, now "
            f"{manifest.fingerprint[:12]}); give it the same shard set, or begin another run with --run"
        )
    return Stage(
        number=number, name=name, directory=directory, data=data, manifest=manifest, status=entry["status"]
    )


def _check_size(manifest: Manifest, settings: Settings, where: Path | str) -> None:
    """Refuse shards of another size or spacing than the preset's."""
    size = STORED_SIZES[settings.preset]
    wanted = {"text": (size.text,), "image": size.image, "volume": size.volume}[manifest.kind]
    spacing = size.spacing_mm if manifest.kind == "volume" else None
    if manifest.shape != wanted or manifest.spacing_mm != spacing:
        of = f" at {manifest.spacing_mm} mm" if manifest.spacing_mm else ""
        by = f" at {spacing} mm" if spacing else ""
        raise UserError(
            f"{where}: holds samples of size {manifest.shape}{of}, preset {settings.preset} takes {wanted}{by}; build the set "
            f"with --preset {settings.preset}, or train with the preset it was built for ({manifest.preset})"
        )
    if manifest.splits["train"].samples == 0:
        raise UserError(f"{where}: holds no training samples; build it from more files")


def _check_model(manifest: Manifest, settings: Settings) -> None:
    """Refuse a model that samples of this size do not fit."""
    model, shape = settings.model, manifest.shape
    if manifest.kind == "text":
        if shape[0] > model.text_positions:
            raise UserError(
                f"model.text_positions={model.text_positions} is less than the {shape[0]} ids of a text of {manifest.name}; "
                "choose at least as many"
            )
        return
    edge = model.image_patch if manifest.kind == "image" else model.volume_patch
    if any(size % edge for size in shape):
        raise UserError(
            f"model.{manifest.kind}_patch={edge} does not divide the size {shape} of {manifest.name}; choose a divisor of "
            "every side"
        )


def _check_batches(settings: Settings, world_size: int) -> None:
    """Refuse batches that do not divide evenly over ranks, micro-batches and mixup runs."""
    training, group = settings.training, settings.rehearsal.mix_group
    if training.batch % world_size:
        raise UserError(
            f"training.batch={training.batch} does not divide over {world_size} ranks; choose a multiple of {world_size}, or "
            "another number of ranks"
        )
    share = training.batch // world_size
    if training.micro_batch and share % training.micro_batch:
        raise UserError(
            f"training.micro_batch={training.micro_batch} does not divide the {share} samples of a rank; choose a divisor, or 0"
        )
    smallest = training.micro_batch or share
    mixes = settings.rehearsal.mixup and settings.rehearsal.strategy == "medcoss"
    if (mixes or training.shuffle_visible) and smallest % group:
        raise UserError(
            f"rehearsal.mix_group={group} does not divide the {smallest} samples that one rank computes at a time; choose "
            f"training.batch, training.micro_batch or fewer ranks so that it does, or begin the run with another mix_group"
        )


def settings_text(settings: Settings) -> str:
    """Return the resolved settings, one a line."""
    return "\n".join(f"  {key} = {value}" for key, value in as_flat(settings).items())
