"""bench/loader.py: what it refuses to time or to believe, its arithmetic, and one short run of all of it."""

import dataclasses
import itertools
import json
import mmap
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2", reason="a peer of the bench reads with OpenCV: pip install -e '.[bench]'")

from mnemos.bench import loader, loader_timing
from mnemos.bench.loader_data import SORTS, Data, make
from mnemos.bench.loader_peers import Loader, Plan, ours
from mnemos.bench.loader_timing import Rate, Refused

SIZES = {"grey": (8, 4), "rgb": (4, 2), "volume": (4, 2)}  # samples, batch
PLAIN = [
    pytest.param(sort, one, id=f"{sort} {one.name}")
    for sort, loaders in loader.LOADERS.items()
    for one in loaders
    if not one.processes  # reading processes are started by the run below
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    folder = tmp_path_factory.mktemp("loader")
    made = {}
    for name, (num, batch) in SIZES.items():
        *_, last = make(SORTS[name], folder / name, num, batch)
        assert isinstance(last, Data)
        made[name] = last
    return made


@pytest.mark.parametrize(("sort", "one"), PLAIN)
def test_every_loader_delivers_the_samples(data: dict[str, Data], sort: str, one: Loader) -> None:
    loader_timing.check(one, data[sort])
    batches = one.open(data[sort], False)
    shapes = {np.shape(one.stored(next(batches))) for _ in range(3)}  # more than the set holds: it goes on
    loader_timing.close(batches)
    assert len(shapes) == 1 and next(iter(shapes))[0] == data[sort].batch


def test_samples_are_of_the_stated_size(data: dict[str, Data]) -> None:
    for sort, kilobytes in (("grey", 6.6), ("rgb", 9.9), ("volume", 379)):
        sizes = [len(payload) for payload in data[sort].payloads(8)]
        assert np.mean(sizes) == pytest.approx(1e3 * kilobytes, rel=0.05), sort
    sizes = [file.stat().st_size for file in data["volume"].files]
    assert np.mean(sizes) == pytest.approx(408e3, rel=0.05)
    assert [len(one.urls) for one in data.values()] == [1, 1, 1]
    assert data["grey"].files[5].read_bytes() == data["grey"].payloads(6)[5]


def test_the_authors_way_augments_when_timed(data: dict[str, Data]) -> None:
    timed = {}
    for sort in ("grey", "volume"):
        (one,) = (one for one in loader.LOADERS[sort] if one.name == loader.AUTHORS)
        first = dataclasses.replace(
            data[sort], files=data[sort].files[: data[sort].batch]
        )  # those of the truth
        random.seed(0)
        batches = one.open(first, False)
        timed[sort] = [sample for _ in range(8) for sample in one.stored(next(batches)).copy()]
    assert not any((image == truth).all() for image in timed["grey"] for truth in data["grey"].truth_NCYX)
    truth = data["volume"].truth_NCYX
    assert all(is_mirrored(volume, truth) for volume in timed["volume"])
    plain = sum(any((volume == one).all() for one in truth) for volume in timed["volume"])
    assert 0 < plain < len(timed["volume"])


def is_mirrored(volume_CZYX: np.ndarray, truth_NCZYX: np.ndarray) -> bool:
    """Return whether a volume is one of these, mirrored along some axes or none."""
    axes = [some for count in range(4) for some in itertools.combinations((1, 2, 3), count)]
    return any((np.flip(volume_CZYX, some) == truth).all() for truth in truth_NCZYX for some in axes)


def giving(values: np.ndarray, name: str = "fake") -> Loader:
    """Return a loader that delivers these values for ever."""

    def batches() -> Iterator[np.ndarray]:
        while True:
            yield values

    return Loader(name=name, open=lambda data, plain: batches(), stored=lambda batch: batch)


@pytest.mark.parametrize(
    ("sort", "change", "right"),
    [
        ("grey", lambda truth: truth, True),
        ("grey", lambda truth: truth.astype(np.float32) + 3, True),
        ("grey", lambda truth: truth.astype(np.float32) + 4, False),
        ("grey", lambda truth: truth.repeat(3, axis=1), True),
        ("grey", lambda truth: truth.repeat(2, axis=1), False),
        ("grey", lambda truth: truth[::-1], False),
        ("grey", lambda truth: truth[..., ::-1], False),
        ("grey", lambda truth: truth[:-1], False),
        ("grey", lambda truth: np.where(np.arange(224) == 7, np.nan, truth), False),
        ("rgb", lambda truth: truth[:, ::-1], False),
        ("rgb", lambda truth: truth[:, :1], False),
        ("volume", lambda truth: truth / 1024.0 * 1024.0, True),
        ("volume", lambda truth: truth + (np.arange(192) == 9), False),
    ],
    ids=[
        "same",
        "three levels",
        "four levels",
        "three channels",
        "two channels",
        "order",
        "flipped",
        "short",
        "nan",
        "bgr",
        "one of three",
        "scaled",
        "one voxel in a row",
    ],
)
def test_wrong_samples_are_refused(data: dict[str, Data], sort: str, change: Any, right: bool) -> None:
    fake = giving(change(data[sort].truth_NCYX))
    if right:
        loader_timing.check(fake, data[sort])
    else:
        with pytest.raises(Refused, match="fake: "):
            loader_timing.check(fake, data[sort])


@pytest.mark.parametrize(
    ("sort", "rate", "us", "fair"),
    [
        ("grey", 1494, 62, True),
        ("grey", 1494 * 0.76, 62, True),
        ("grey", 1494 * 0.74, 62, False),
        ("grey", 1494 * 1.26, 62, False),
        ("grey", 747, 124, True),  # a machine half as fast
        ("grey", 1494, 124, False),
        ("volume", 246, 2309, True),
        ("volume", 246 / 2, 2309, False),
    ],
)
def test_a_straw_man_is_named(sort: str, rate: float, us: float, fair: bool) -> None:
    assert bool(loader_timing.straw_man(sort, rate, us)) != fair


def test_decoders_alone_open_the_same_samples(data: dict[str, Data]) -> None:
    for decoders in (loader_timing.DECODERS, loader_timing.AUTHORS_DECODERS):
        for sort, one in decoders.items():
            items, truth_CYX = one.items(data[sort]), data[sort].truth_NCYX[0]
            found: Any = one.decode(items[0])
            whole = truth_CYX.tobytes() if sort == "volume" else truth_CYX.transpose(1, 2, 0).tobytes()
            assert bytes(found) == whole and loader_timing.calibrate(one, items) > 0


def found_of(data: Data, us: float, **rates: list[float]) -> loader.Found:
    """Return what would be found with these rates; names with an underscore for a blank, `authors` for the authors'."""
    named = {
        loader.AUTHORS if name == "authors" else name.replace("_", " "): each for name, each in rates.items()
    }
    return loader.Found(
        data=data,
        rates={name: [Rate(per_cpu_s=one, per_s=one / 2) for one in each] for name, each in named.items()},
        us={"simplejpeg": [us, us * 9, us / 9]},
        growth=16 << 20,
    )


def test_targets_are_medians_and_ratios_the_rounds_own(data: dict[str, Data]) -> None:
    found = found_of(
        data["grey"],
        124.0,
        ours=[100.0, 9000.0, 90000.0],
        authors=[10.0, 4500.0, 30000.0],
        webdataset_pil=[1.0, 1.0, 9e9],
    )
    rows = {
        row["target"]: row
        for row in (loader.judged(one, found) for one in loader.TARGETS if one.sort == "grey")
    }
    rate, webdataset, authors = rows.values()
    assert (rate["reached"], rate["scaled"], rate["met"]) == (9000, 18000, True)
    assert (webdataset["reached"], webdataset["met"], webdataset["scaled"]) == (100, True, None)
    assert (authors["reached"], authors["least"], authors["met"]) == (3, 7, False)
    assert loader.judged_memory(found)["met"]
    assert not loader.judged_memory(dataclasses.replace(found, growth=(16 << 20) + 1))["met"]
    assert not loader.judged_memory(dataclasses.replace(found, growth=None))["met"]
    ours_row, authors_row, _ = loader.figures(found)
    assert (ours_row["clock_per_s"], ours_row["ratio"], authors_row["ratio"]) == (4500, 1, 3)
    assert ours_row["per_s_p20"] == pytest.approx(0.6 * 100 + 0.4 * 9000)


def test_a_refused_peer_misses_its_target(data: dict[str, Data]) -> None:
    found = found_of(data["grey"], 62.0, ours=[9001.0])
    met = [loader.judged(one, found)["met"] for one in loader.TARGETS if one.sort == "grey"]
    assert met == [True, False, False]


def test_each_figure_asked_for_is_a_target() -> None:
    asked = {(one.sort, one.than): one.least for one in loader.TARGETS}
    assert asked == {
        ("grey", ""): 9000,
        ("grey", "webdataset pil"): 2,
        ("grey", "authors'"): 7,
        ("volume", ""): 4500,
        ("volume", "authors'"): 12,
    }
    assert (loader.Size().memory, loader.GROWTH_BYTES) == ((5_000, 50_000), 16 * 2**20)
    for sort, loaders in loader.LOADERS.items():
        assert {"ours", "ours, 1 worker", "ours, 2 workers"} <= {one.name for one in loaders}
        assert {one.than for one in loader.TARGETS if one.sort == sort} <= {
            "",
            *(one.name for one in loaders),
        }


@pytest.mark.parametrize("kept", [True, False])
def test_memory_that_is_kept_is_seen(data: dict[str, Data], kept: bool) -> None:
    held: list[mmap.mmap] = []  # memory of its own: what was freed before would hide the growth

    def batches() -> Iterator[None]:
        while True:
            memory = mmap.mmap(-1, 1 << 20)
            memory.write(b"x" * (1 << 20))
            if kept:
                held.append(memory)
            yield

    fake = Loader(name="fake", open=lambda data, plain: batches(), stored=np.array)
    taken = loader_timing.growth(fake, data["grey"], 40, 40 + 4 * 64)  # 64 batches of 4
    assert (taken > 60 << 20) == kept and (kept or taken < 8 << 20)


def test_our_stream_keeps_no_memory(data: dict[str, Data]) -> None:
    assert loader_timing.growth(ours(0), data["grey"], 800, 4_000) < 4 << 20


@pytest.mark.parametrize("processes", [True, False])
def test_windows_are_of_a_loader_in_its_stride(data: dict[str, Data], processes: bool) -> None:
    events: list[str] = []

    def batches() -> Iterator[None]:
        events.append("start")
        try:
            while True:
                events.append("batch")
                yield
        finally:
            events.append("end")

    fake = Loader(name="fake", open=lambda data, plain: batches(), stored=np.array, processes=processes)
    opened = loader_timing.Opened(fake, data["grey"])
    rates = [opened.window(1e-9) for _ in range(2)]
    opened.close()
    assert all(rate.per_s > 0 and rate.per_cpu_s > 0 for rate in rates)
    warm = ["start", *["batch"] * (8 // 4 + 4)]  # a pass over the set, and all memory of batches
    apart = ["end", *warm] if processes else []
    assert events == [*warm, "batch", *apart, "batch", "end"]


@pytest.mark.parametrize("plain", [True, False])
def test_a_plan_takes_every_sample_once_an_epoch(plain: bool) -> None:
    requests = iter(Plan(num=6, batch=4, plain=plain)())
    taken = np.concatenate([next(requests).samples for _ in range(6)]).reshape(4, 6)
    assert all(sorted(epoch) == list(range(6)) for epoch in taken.tolist())
    assert (len({tuple(epoch) for epoch in taken.tolist()}) == 1) == plain


def test_a_short_run_of_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "machine", lambda: {"device": "test"})
    out = tmp_path / "rows.jsonl"
    assert loader.main(["--quick", "--sorts", "grey", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["loader"] for row in rows if "loader" in row] == [one.name for one in loader.LOADERS["grey"]]
    assert all(
        row["per_s"] > 0 and row["ratio"] > 0 and row["bench"] == "loader" for row in rows if "loader" in row
    )
    assert len([row for row in rows if "target" in row]) == 4
    assert "figures mean nothing" in capsys.readouterr().out


def changed(one: Loader) -> Loader:
    """Return a loader that delivers each batch in the reverse order."""
    return dataclasses.replace(one, stored=lambda batch: one.stored(batch)[::-1])


def test_a_wrong_sample_ends_the_run_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = loader.LOADERS["grey"][3], changed(ours(0))
    monkeypatch.setitem(loader.LOADERS, "grey", (wrong, right))
    assert loader.main(["--quick", "--sorts", "grey"]) == 1
    printed = capsys.readouterr()
    assert "not timed: grey: ours: values differ" in printed.err + printed.out
    assert "grey/s a core" in printed.out and "MISSED" in printed.out


@pytest.mark.parametrize(
    ("rates", "complaint"),
    [
        ({"ours": [9e4], "authors": [1494.0], "webdataset_pil": [1.0]}, ""),
        ({"ours": [9e4], "authors": [1000.0], "webdataset_pil": [1.0]}, "no fair peer"),
        ({"ours": [8e3], "authors": [1200.0], "webdataset_pil": [1.0]}, "missed: grey/s a core"),
    ],
    ids=["well", "straw", "missed"],
)
def test_the_exit_code_tells(
    data: dict[str, Data],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: dict[str, list[float]],
    complaint: str,
) -> None:
    found = found_of(data["grey"], 62.0, **rates)
    targets = [loader.judged(one, found) for one in loader.TARGETS if one.sort == "grey"]
    monkeypatch.setattr(loader, "run", lambda given, size: ([found], targets))
    assert loader.main([]) == int(bool(complaint))
    assert complaint in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [["--sorts", "x"], ["--rounds", "0"], ["--seconds", "0"], ["--out", "no-such-folder/rows"]],
    ids=["sorts", "rounds", "seconds", "out"],
)
def test_a_wrong_call_is_one_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_opencv_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    assert loader.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert "pip install" in error and "opencv-python-headless" in error and error.count("\n") == 1
