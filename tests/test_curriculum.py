"""From flags, data and ledger to a plan: make semantics, and every mistake refused before anything is made."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_data import make_tiny_sets

from mnemos.engine import curriculum
from mnemos.engine.arguments import Arguments
from mnemos.engine.curriculum import Plan, make_plan
from mnemos.engine.data_root import find_shard_sets
from mnemos.engine.run_directory import CARD, CONFIG, LEDGER, WEIGHTS, RunDirectory
from mnemos.engine.settings import resolve
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER


@pytest.fixture
def call(tiny_sets: Path, tmp_path: Path) -> Arguments:
    """Return a sound call; the tests change it."""
    return Arguments(
        stage="pathology",
        only=False,
        dry_run=False,
        fresh=False,
        run=tmp_path / "run",
        data=tiny_sets,
        preset=None,
        overrides={},
        deepspeed_config=None,
    )


def begin(call: Arguments, complete: tuple[str, ...]) -> RunDirectory:
    """Lay out a run as it is once some stages are complete; weights are empty files."""
    plan = make_plan(call, 1)
    run = RunDirectory(plan.run)
    run.create(plan.settings)
    run.set_stages([stage.name for stage in plan.stages], plan.data)
    for stage in plan.stages:
        if stage.name in complete:
            shutil.copytree(stage.data, stage.buffer)
            for file in (WEIGHTS, CARD):
                (stage.directory / file).touch()
            run.record(stage.name, status="complete", data=stage.manifest.fingerprint)
    return run


def names(stages: tuple[Any, ...]) -> list[str]:
    return [stage.name for stage in stages]


def refusal(call: Arguments, world_size: int = 1, **changes: Any) -> str:
    """Return the sentence; nothing may have been made or changed below the run's parent."""
    call = replace(call, **changes)
    root = call.run.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(UserError) as caught:
        make_plan(call, world_size)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    sentence = str(caught.value)
    assert ";" in sentence and "\n" not in sentence, sentence
    return sentence


def test_a_plan_holds_all_stages_up_to_the_asked_one(call: Arguments) -> None:
    plan = make_plan(call, 1)
    assert names(plan.stages) == names(plan.todo) == list(DEFAULT_ORDER)
    assert [stage.directory.name for stage in plan.stages] == [
        "01-report", "02-xray", "03-ct", "04-mri", "05-pathology"
    ]  # fmt: skip
    assert all(
        stage.manifest.name == stage.name and stage.data == call.data / stage.name for stage in plan.stages
    )
    assert names(make_plan(replace(call, stage="xray"), 1).stages) == ["report", "xray"]
    assert not call.run.exists()


def test_what_is_rehearsed(call: Arguments) -> None:
    plan = make_plan(call, 1)
    assert names(plan.rehearsed(plan.stages[0])) == []
    assert names(plan.rehearsed(plan.stages[3])) == ["report", "xray", "ct"]
    plain = make_plan(replace(call, overrides={"rehearsal.strategy": "sequential"}), 1)
    assert plain.rehearsed(plain.stages[3]) == () and names(plain.earlier(plain.stages[3])) == names(
        plan.stages[:3]
    )


def test_the_length_of_a_stage(call: Arguments) -> None:
    def steps(**overrides: float) -> int:
        settings = {name.replace("__", "."): value for name, value in overrides.items()}
        plan = make_plan(replace(call, overrides={"training.batch": 8, **settings}), 1)
        return plan.schedule(plan.stages[0], ()).num_steps

    assert steps(training__epochs=3) == 12  # 32 samples in batches of 8
    assert steps(training__epochs=0.5) == 2
    assert steps(training__epochs=0.01) == 1
    assert steps(training__epochs=3, training__steps=7) == 7


def test_finished_stages_are_not_done_again(call: Arguments) -> None:
    begin(call, complete=("report", "xray"))
    plan = make_plan(call, 1)
    assert names(plan.todo) == ["ct", "mri", "pathology"] and names(plan.stages) == list(DEFAULT_ORDER)
    assert make_plan(replace(call, stage="xray"), 1).todo == ()
    again = make_plan(replace(call, fresh=True), 1)
    assert names(again.todo) == list(DEFAULT_ORDER)


def test_the_run_remembers_where_its_data_lies(call: Arguments, tiny_sets: Path) -> None:
    begin(call, complete=("report",))
    assert make_plan(replace(call, data=None), 1).data == tiny_sets


def test_a_subset_of_modalities_in_another_order(call: Arguments) -> None:
    overrides = {"curriculum.stages": ["ct", "report"]}
    plan = make_plan(replace(call, stage="report", overrides=overrides), 1)
    assert names(plan.stages) == ["ct", "report"]


def test_a_stage_is_appended_to_a_run(call: Arguments) -> None:
    first = replace(call, stage="report", overrides={"curriculum.stages": ["report"]})
    run = begin(first, complete=("report",))
    plan = make_plan(replace(call, stage="mri"), 1)
    assert (names(plan.stages), names(plan.todo)) == (["report", "mri"], ["mri"])
    run.set_stages(["report", "mri"], plan.data)
    assert names(make_plan(replace(call, stage="ct"), 1).stages) == ["report", "mri", "ct"]


def test_only_does_one_stage_or_refuses(call: Arguments) -> None:
    begin(call, complete=("report", "xray"))
    assert names(make_plan(replace(call, stage="ct", only=True), 1).todo) == ["ct"]
    assert make_plan(replace(call, stage="xray", only=True), 1).todo == ()
    sentence = refusal(call, stage="pathology", only=True)
    assert "--only pathology" in sentence and "ct, mri" in sentence and "xray" not in sentence


def test_a_finished_stage_needs_no_data_any_more(call: Arguments, tmp_path: Path) -> None:
    begin(call, complete=("report", "xray"))
    rest = tmp_path / "rest"
    rest.mkdir()
    for name in ("ct", "mri", "pathology"):
        (rest / name).symlink_to(call.data / name)
    plan = make_plan(replace(call, data=rest), 1)
    assert names(plan.todo) == ["ct", "mri", "pathology"]
    assert (plan.stages[0].data, plan.stages[0].manifest.name) == (None, "report"), "its buffer tells"
    assert "stage ct has no data" in refusal(call, data=_only(tmp_path, call.data, "mri"))


def _only(tmp_path: Path, data: Path, name: str) -> Path:
    folder = tmp_path / f"only-{name}"
    folder.mkdir()
    (folder / name).symlink_to(data / name)
    return folder


def test_an_unknown_stage_lists_the_known_ones(call: Arguments) -> None:
    sentence = refusal(call, stage="ultrasound")
    assert "'ultrasound'" in sentence and all(name in sentence for name in DEFAULT_ORDER)


def test_wrong_data_folders(call: Arguments, tmp_path: Path) -> None:
    assert "no such folder" in refusal(call, data=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no shard set" in refusal(call, data=empty)
    (empty / "films").mkdir()
    (empty / "films" / "film.jpg").touch()
    assert "holds no shard set" in refusal(call, data=empty)
    assert "itself a shard set" in refusal(call, data=call.data / "xray")
    assert "no such folder" in refusal(call, data=empty / "films" / "film.jpg")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a", "b"):
        (twice / name).symlink_to(call.data / "report")
    assert "a and b both hold report" in refusal(call, data=twice)


def test_a_set_under_construction_is_not_seen(call: Arguments, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    for name in ("report", ".report.partial-7"):
        (folder / name).symlink_to(call.data / "report")
    assert list(find_shard_sets(folder)) == ["report"]


@pytest.mark.parametrize(
    "content", ["", "{}", '{"format": "mnemos-shards-1"}', "[1"], ids=["empty", "no", "part", "torn"]
)
def test_a_damaged_manifest_is_named(call: Arguments, tmp_path: Path, content: str) -> None:
    data = _only(tmp_path, call.data, "xray")
    shutil.copytree(call.data / "report", data / "report")
    (data / "report" / "manifest.json").write_text(content)
    sentence = refusal(call, data=data)
    assert "manifest.json" in sentence and "damaged" in sentence


def test_a_missing_shard_is_named(call: Arguments, tmp_path: Path) -> None:
    data = _only(tmp_path, call.data, "xray")
    shutil.copytree(call.data / "report", data / "report")
    (data / "report" / "train" / "000000.tar").unlink()
    assert "000000.tar is missing" in refusal(call, data=data)


def test_data_of_another_size_is_refused(call: Arguments) -> None:
    sentence = refusal(call, preset="base")
    assert "(64,)" in sentence and "(112,)" in sentence and "--preset" in sentence


def test_other_data_than_the_run_was_begun_with_is_refused(call: Arguments, tmp_path: Path) -> None:
    begin(call, complete=("report",))
    other = make_tiny_sets(tmp_path / "other", samples=24)
    sentence = refusal(call, data=other)
    first, second = (load_manifest(data / "report").fingerprint[:12] for data in (call.data, other))
    assert first in sentence and second in sentence and "--run" in sentence


def test_a_contradiction_with_the_run_is_refused(call: Arguments) -> None:
    begin(call, complete=("report",))
    assert "training.batch is 16 there and 8" in refusal(call, overrides={"training.batch": 8})
    assert "preset is 'sample' there" in refusal(call, preset="base")
    assert names(make_plan(replace(call, overrides={"training.batch": 8}, fresh=True), 1).todo) == list(
        DEFAULT_ORDER
    )


@pytest.mark.parametrize("file", [CONFIG, LEDGER])
def test_a_damaged_run_is_refused_unless_begun_afresh(call: Arguments, file: str) -> None:
    run = begin(call, complete=("report",))
    (run.path / file).write_text("{")
    assert "is damaged" in refusal(call)
    assert names(make_plan(replace(call, fresh=True), 1).todo) == list(DEFAULT_ORDER)


@pytest.mark.parametrize("lost", [WEIGHTS, CARD, "buffer"])
def test_a_finished_stage_that_lost_its_files_is_named(call: Arguments, lost: str) -> None:
    run = begin(call, complete=("report", "xray"))
    path = run.stage(2, "xray") / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert str(path.parent) in refusal(call)


def test_a_foreign_folder_is_neither_used_nor_moved(call: Arguments) -> None:
    call.run.mkdir()
    (call.run / "thesis.tex").touch()
    assert "thesis.tex" in refusal(call)
    assert "thesis.tex" in refusal(call, fresh=True)


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        ({"training.batch": 10}, 4, ["training.batch=10", "4 ranks", "multiple of 4"]),
        ({"training.batch": 16, "training.micro_batch": 6}, 1, ["training.micro_batch=6", "16"]),
        ({"training.batch": 16, "training.micro_batch": 32}, 1, ["training.micro_batch=32"]),
        ({"training.batch": 16}, 8, ["rehearsal.mix_group=4", "the 2 samples"]),
        (
            {"training.batch": 6, "rehearsal.strategy": "sequential", "training.shuffle_visible": True},
            1,
            ["mix_group"],
        ),
        ({"rehearsal.least_share": 0.25}, 1, ["rehearsal.least_share=0.25"]),
        ({"model.image_patch": 7}, 1, ["model.image_patch=7", "(64, 64)", "xray"]),
        ({"model.volume_patch": 16}, 1, ["model.volume_patch=16", "(8, 64, 64)", "ct"]),
        ({"model.text_positions": 63}, 1, ["model.text_positions=63", "64 ids", "report"]),
        ({"curriculum.stages": ["report", "ct", "report"]}, 1, ["names a stage twice"]),
        ({"curriculum.stages": ["report", "pet", "pathology"]}, 1, ["stage pet has no data"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(
    call: Arguments, overrides: dict[str, Any], world: int, words: list[str]
) -> None:
    sentence = refusal(call, world, overrides=overrides)
    assert all(word in sentence for word in words), sentence


def test_batches_that_mix_nothing_divide_as_they_like(call: Arguments) -> None:
    for overrides in ({"rehearsal.mixup": False}, {"rehearsal.strategy": "sequential"}):
        assert make_plan(replace(call, overrides={"training.batch": 6, **overrides}), 2).todo


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"train_batch_size": 8}', "training.batch"),
        ('{"bf16": {}}', "training.precision"),
        ('{"zero_optimization": 2}', "an object is needed"),
        ('{"zero_optimization": {"stage": 5}}', "ZeRO stage 5"),
        ('{"zero_optimization": {"stage": true}}', "ZeRO stage True"),
    ],
)
def test_a_wrong_deepspeed_configuration(
    call: Arguments, tmp_path: Path, content: str | None, word: str
) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    sentence = refusal(call, deepspeed_config=file)
    assert word in sentence and str(file) in sentence


class TestSampleShards:
    """Without --data the sample shards are used, and made at first use only."""

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sets: Path) -> list[Path]:
        calls: list[Path] = []

        def make_sample_shards(root: Path) -> None:
            calls.append(root)
            shutil.copytree(tiny_sets, root)

        module = ModuleType("mnemos.sharding.synthetic.make")
        module.make_sample_shards = make_sample_shards  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        (tmp_path / "repository" / "data_shards").mkdir(parents=True)
        monkeypatch.setattr(curriculum, "REPOSITORY", tmp_path / "repository")
        return calls

    def test_once(self, call: Arguments, made: list[Path], tmp_path: Path) -> None:
        folder = tmp_path / "repository" / "data_shards" / "sample"
        plans: list[Plan] = [make_plan(replace(call, data=None), 1) for _ in range(2)]
        assert [plan.data for plan in plans] == [folder, folder] and made == [folder]

    def test_not_for_a_call_that_is_refused(self, call: Arguments, made: list[Path]) -> None:
        call = replace(call, data=None)
        refusal(call, stage="ultrasound")
        refusal(call, overrides={"training.batch": 7}, world_size=2)
        assert "--data" in refusal(call, preset="base")
        assert made == []


def test_sample_shards_of_an_older_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data_shards" / "sample" / DEFAULT_ORDER[0]
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": "mnemos-shards-1"}')
    monkeypatch.setattr(curriculum, "REPOSITORY", tmp_path)
    with pytest.raises(UserError, match="older version; remove that folder"):
        curriculum._default_data(resolve("sample", {}))
