"""bench/scaling.py: its arithmetic, what it refuses, what it sends, and a run against two real ranks."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from PIL import Image
from tiny_data import TINY

from mnemos.bench import scaling
from mnemos.bench.scaling_check import checks
from mnemos.bench.scaling_inputs import GBIT, Measured, inputs_of, listed, planned
from mnemos.bench.scaling_model import Cluster, Collective, Compute, Group, Inputs, Link, collectives, predict
from mnemos.bench.scaling_picture import draw
from mnemos.bench.scaling_runs import ask, check_flags, make_shards, stage_flags
from mnemos.bench.scaling_worker import Counted, timed
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet

REPO = Path(__file__).resolve().parents[1]
ALONE = Compute(forward_s=0.1, backward_s=0.2, optimizer_s=0.08, rest_s=0.02, load_s=0.1)
BUSY = Compute(forward_s=0.2, backward_s=0.3, optimizer_s=0.08, rest_s=0.02, load_s=0.1)
SENT = [
    Collective(name="all-reduce", num_bytes=1_000_000, calls=1),
    Collective(name="all-gather", num_bytes=2_000_000, calls=4),
]
FAST = Link(latency_s=0.001, bytes_per_s=1e8)
SLOW = Link(latency_s=0.002, bytes_per_s=1e7)
CLUSTER = Cluster(ranks_per_node=4, within={"all-reduce": FAST, "all-gather": FAST}, between=SLOW)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every machine look like the smallest one on which two ranks run."""
    monkeypatch.setattr(scaling, "processors", lambda: ("cpu", 2))


def inputs(**changes: Any) -> Inputs:
    given: dict[str, Any] = {"batch": 8, "one": ALONE, "many": BUSY, "collectives": SENT}
    return Inputs(**{**given, "overlap": 0.0, "readers": 0, **changes})


def test_a_ring_moves_its_bytes_and_pays_its_latency() -> None:
    reduce, gather = SENT
    assert FAST.seconds(reduce, 1) == 0.0
    assert FAST.seconds(reduce, 2) == pytest.approx(0.001 + 2 * 1 / 2 * 0.01)
    assert FAST.seconds(reduce, 8) == pytest.approx(3 * 0.001 + 2 * 7 / 8 * 0.01)
    assert FAST.seconds(gather, 2) == pytest.approx(4 * 0.001 + 1 / 2 * 0.02)
    within_and_between = (2 * 0.001 + 2 * 3 / 4 * 0.01) + (0.002 + 2 * 1 / 2 * 0.1)
    assert CLUSTER.seconds(reduce, 8) == pytest.approx(within_and_between)
    assert CLUSTER.seconds(reduce, 4) == pytest.approx(2 * 0.001 + 2 * 3 / 4 * 0.01), "one node"


def test_a_step_adds_compute_reading_and_network_and_shares_the_optimiser() -> None:
    one, two = predict(inputs(), CLUSTER, 1), predict(inputs(), CLUSTER, 2)
    assert one.step_s == pytest.approx(0.5) and one.network_s == 0 and one.efficiency == 1
    assert two.compute_s == pytest.approx(0.2 + 0.3 + 0.02 + 0.08 / 2), "with a neighbour that computes"
    assert two.network_s == pytest.approx(0.011 + 0.014)
    assert two.step_s == pytest.approx(two.compute_s + two.network_s + 0.1)
    assert two.samples_per_s == pytest.approx(16 / two.step_s)
    assert two.efficiency == pytest.approx(0.5 / two.step_s)


def test_reading_processes_bound_a_step_only_where_they_are_slower() -> None:
    beside = predict(inputs(readers=1), CLUSTER, 1)
    assert beside.step_s == pytest.approx(0.4) and beside.bound == "compute"
    slow = Compute(**{**ALONE.__dict__, "load_s": 1.8})
    waiting = predict(inputs(readers=3, one=slow), CLUSTER, 1)
    assert waiting.step_s == pytest.approx(0.6) and waiting.bound == "loader"
    assert predict(inputs(one=slow), CLUSTER, 1).step_s == pytest.approx(2.2), "in the process it adds up"


def test_overlap_hides_only_gradients_and_no_more_than_the_backward_pass() -> None:
    plain = predict(inputs(), CLUSTER, 8).network_s
    gather = CLUSTER.seconds(SENT[1], 8)
    assert predict(inputs(overlap=1.0), CLUSTER, 8).network_s == pytest.approx(gather)
    assert predict(inputs(overlap=0.5), CLUSTER, 8).network_s == pytest.approx((plain + gather) / 2)
    short = Compute(**{**BUSY.__dict__, "backward_s": 0.01})
    hidden = predict(inputs(overlap=1.0, many=short), CLUSTER, 8).network_s
    assert hidden == pytest.approx(plain - 0.01)
    thin = Cluster(ranks_per_node=4, within=CLUSTER.within, between=Link(latency_s=0.1, bytes_per_s=1e6))
    assert predict(inputs(), thin, 8).bound == "network"


def test_gradients_of_active_parts_and_weights_of_all_are_sent() -> None:
    groups = [Group(part="blocks", values=100), Group(part="blocks", values=7), Group(part="head", values=50)]
    reduce, gather = collectives(groups, frozenset({"blocks"}), element_bytes=2)
    assert (reduce.num_bytes, reduce.calls) == (214, 2), "and a flag"
    assert (gather.num_bytes, gather.calls) == (314, 3)
    large = [Group(part="blocks", values=1_200_000_000)]
    assert collectives(large, frozenset({"blocks"}), element_bytes=4)[0].calls == 4, "buckets"


def measured(rounds: int = 1, **facts: Any) -> Measured:
    """Return what two ranks would say that behave exactly as the model has it, on a network of 1e8 and 5e7 bytes/s."""
    about = {"batch": 8, "micro_batch": 8, "kind": "image", "zero": 1, "element_bytes": 4, "readers": 0}
    about |= {"groups": [["a", 250_000], ["b", 250_000]], "active": ["a"], "device": "cpu", "threads": 1}
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        load = 1 + number  # another load on the machine in every round
        for turn, compute in (("one", ALONE), ("many", BUSY)):
            names = ("forward_s", "backward_s", "optimizer_s", "rest_s")
            answers = {
                "step": {"step_s": load * compute.step_s(1)},
                "split": {name: 2 * load * getattr(compute, name) for name in names},
                "load": {"load_s": load * compute.load_s},
            }
            for question, answer in answers.items():
                found.setdefault(f"{turn} {question}", []).append(answer)
        network = {"empty_bytes": 8.0, "full_bytes": 1e6, "all-reduce empty_s": 0.001 * load}
        network |= {"all-reduce full_s": 0.011 * load, "all-gather empty_s": 0.001 * load}
        network |= {"all-gather full_s": 0.011 * load}
        found.setdefault("joint network", []).append(network)
        found.setdefault("one updates", []).append({"update_s": load * 0.5})
        sent_s = (0.001 + 0.01) + (2 * 0.001 + 2 * 0.01)
        found.setdefault("joint updates", []).append({"update_s": load * (BUSY.step_s(2) + 0.1 + sent_s)})
    counted = {"all-reduce": [1, 1_000_000], "all-gather": [2, 2_000_000]}  # without a flag
    return Measured(facts={**about, **facts}, rounds=found, counted=counted)


def make(one: Measured) -> Inputs:
    return inputs_of(one, cores=1, overlap=0.0)


def test_inputs_come_back_out_of_what_was_measured() -> None:
    found = make(measured())
    assert found.one.__dict__ == pytest.approx(ALONE.__dict__), "split by waiting, long as without"
    assert found.many.__dict__ == pytest.approx(BUSY.__dict__)
    assert [one.calls for one in found.collectives] == [1, 2], "as counted"
    untold = Measured(**{**measured().__dict__, "counted": None})
    assert [one.calls for one in make(untold).collectives] == [2, 2], "as derived"
    links = measured().cluster().within
    assert links["all-reduce"].bytes_per_s == pytest.approx(1e8), "two ranks move each byte once"
    assert links["all-gather"].bytes_per_s == pytest.approx(5e7), "and half of them"
    assert links["all-gather"].latency_s == pytest.approx(0.001)
    faster = inputs_of(measured(), cores=1, overlap=0.0, samples_per_core=40)
    assert faster.one.load_s == pytest.approx(0.2)
    assert inputs_of(measured(readers=4), cores=2, overlap=0.0).readers == 2, "no more than there are cores"


def test_a_machine_that_is_as_the_model_has_it_agrees_with_it() -> None:
    found = checks(measured(rounds=3), make)
    assert [one.what for one in found][:2] == ["1 rank", "2 ranks"]
    assert [one.difference for one in found] == pytest.approx([0.0] * 4, abs=1e-9)


def test_a_difference_is_that_of_the_rounds_not_of_the_medians() -> None:
    one = measured(rounds=3)
    for place, factor in enumerate((1.5, 1.0, 1.5)):  # the model is too quick by half in two rounds of three
        one.rounds["joint updates"][place]["update_s"] *= factor  # type: ignore[index]
    assert checks(one, make)[1].difference == pytest.approx(0.5)


def test_bytes_that_differ_are_off_whatever_the_limit() -> None:
    one = Measured(
        **{**measured().__dict__, "counted": {"all-reduce": [1, 900_000], "all-gather": [2, 2_000_000]}}
    )
    _, _, reduce, gather = checks(one, make)
    assert abs(reduce.difference) > reduce.limit and abs(gather.difference) <= gather.limit


def given(*argv: str) -> argparse.Namespace:
    parsed = scaling.make_parser().parse_args(list(argv))
    scaling.check_given(parsed)
    return parsed


def test_flags_replace_what_was_measured_and_every_input_says_how_it_was_got() -> None:
    flags = given("--intra-gbps", "800", "--inter-gbps", "400", "--latency-us", "5", "--ranks-per-node", "8")
    cluster = planned(measured(), flags)
    assert {link.bytes_per_s for link in cluster.within.values()} == {800 * GBIT}
    assert cluster.between == Link(latency_s=1e-6 * 5, bytes_per_s=400 * GBIT) and cluster.ranks_per_node == 8
    rows = {row["name"]: row for row in listed(measured(), make(measured()), cluster, flags)}
    assert rows["between nodes"]["how"].startswith("stated") and all(row["how"] for row in rows.values())
    here = given("--ranks-per-node", "2")
    assert planned(measured(), here).within == measured().cluster().within
    rows = {row["name"]: row for row in listed(measured(), make(measured()), planned(measured(), here), here)}
    assert rows["between nodes"]["how"].startswith("ASSUMED")
    assert rows["within a node, all-reduce"]["how"].startswith("measured: gloo")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--inter-gbps", "-1"], "--inter-gbps -1"),
        (["--overlap", "1.5"], "--overlap 1.5"),
        (["--no-check"], "give --intra-gbps and --latency-us"),
        (["--no-check", "--intra-gbps", "10"], "give --intra-gbps and --latency-us"),
        (["--ranks-per-node", "4", "--ranks", "6"], "--ranks 6"),
        (["--out", "nowhere/x.jsonl"], "there is no folder nowhere"),
        (["--set", "training.batch=4"], "--batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_it_refuses(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_machine_without_a_second_rank_needs_the_network_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "processors", lambda: ("cuda", 1))
    with pytest.raises(UserError, match="give --intra-gbps"):
        given()
    with pytest.raises(UserError, match="--check needs 2"):
        given("--check")
    told = scaling.make_parser().parse_args(["--intra-gbps", "100", "--latency-us", "9"])
    assert scaling.check_given(told) is False and told.ranks_per_node == 1


@pytest.mark.parametrize("kind", ["text", "image", "volume"])
def test_random_shards_are_a_stage_that_can_be_trained(kind: str, tmp_path: Path) -> None:
    modality = next(one for one in MODALITIES.values() if one.kind == kind)
    make_shards(tmp_path, modality, "sample", 8)
    assert len(ShardSet(tmp_path / modality.name, "train")) == 8
    flags = stage_flags(modality.name, "sample", tmp_path, ["training.batch=4", "training.precision=fp32"])
    check_flags(flags, 2)
    with pytest.raises(UserError, match="ZeRO 1 and 2"):
        check_flags([*flags, "--set", "parallel.zero=3"], 2)


def test_the_picture_has_a_bar_for_every_number_of_ranks(tmp_path: Path) -> None:
    steps = [predict(inputs(), CLUSTER, ranks) for ranks in (1, 2, 4, 8, 16)]
    draw(tmp_path / "short.png", steps[:2], "a title")
    draw(tmp_path / "long.png", [*steps, *steps], "a title")
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "long.png") as long:
        assert long.width > short.width and short.info["Title"] == "a title"
        counts = [
            {colour: number for number, colour in picture.getcolors(1 << 20) or []}
            for picture in (short, long)
        ]
    for colour in ((0, 114, 178), (213, 94, 0), (168, 205, 230)):
        assert all(count.get(colour, 0) > 100 for count in counts), colour


@pytest.mark.filterwarnings("ignore:.*all_gather.*:FutureWarning")
def test_collectives_are_counted_with_their_bytes() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with Counted() as counted:
            torch.distributed.all_reduce(torch.zeros(10, dtype=torch.bfloat16))
            torch.distributed.all_reduce(torch.zeros(3))
            torch.distributed.all_gather_into_tensor(torch.zeros(8), torch.zeros(4))
            torch.ones(5) + 1
    finally:
        torch.distributed.destroy_process_group()
    assert counted.found == {"all-reduce": [2, 32], "all-gather": [1, 32]}


class Answering:
    def __init__(self, answer: dict[str, float]) -> None:
        self.answer = lambda: answer
        self.asked: list[object] = []
        self.send = self.asked.append


def test_all_are_asked_before_one_is_waited_for_and_the_slowest_counts() -> None:
    slow = {"forward_s": 1.0, "rest_s": 3.0, "full_bytes": 1.0}
    quick = {"forward_s": 2.0, "rest_s": 1.0, "full_bytes": 9.0}
    processes = [Answering(quick), Answering(slow)]
    assert ask(processes, "split", 3) == slow  # type: ignore[arg-type]
    assert [process.asked for process in processes] == [[["split", 3]]] * 2


class Owner:
    def work(self, number: int) -> int:
        if number < 0:
            raise ValueError(number)
        return number + 1


def test_a_method_is_timed_and_put_back() -> None:
    owner, spent = Owner(), {"work_s": 0.0}
    with timed(owner, "work", spent, "work_s"):
        assert owner.work(1) == 2
        first = spent["work_s"]
        with pytest.raises(ValueError, match="-1"):
            owner.work(-1)
    assert 0 < first < spent["work_s"] and vars(owner) == {}
    stop: Callable[[int], int] = lambda number: number
    owner.work = stop  # type: ignore[method-assign]
    with timed(owner, "work", spent, "work_s"):
        assert owner.work(4) == 4
    assert owner.work is stop, "what stood on the object itself stands there again"


@pytest.mark.slow
def test_two_real_ranks_send_what_the_model_says(tmp_path: Path) -> None:
    flags = [
        part
        for text in TINY
        if not text.startswith(("training.batch", "training.steps"))
        for part in ("--set", text)
    ]
    out, picture = tmp_path / "scaling.jsonl", tmp_path / "scaling.png"
    command = [
        sys.executable,
        REPO / "bench" / "scaling.py",
        "--batch",
        "4",
        "--rounds",
        "2",
        "--updates",
        "2",
    ]
    command += ["--check", "--limit", "1e9", "--ranks", "1", "2", "4", "--ranks-per-node", "2"]
    done = subprocess.run(
        [*command, "--out", out, "--picture", picture, *flags], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = {line["check"]["what"]: line["check"] for line in lines if "check" in line}
    for name in ("all-reduce", "all-gather"):
        assert found[f"bytes of {name}"]["difference"] == pytest.approx(0, abs=0.01)
    assert all(math.isfinite(one["difference"]) and one["measured"] > 0 for one in found.values())
    assert [line["ranks"] for line in lines if "ranks" in line] == [1, 2, 4] and picture.stat().st_size > 1000
