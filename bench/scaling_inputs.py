"""From what was measured, and what flags state, to the model's inputs; and the list of them for people."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mnemos.bench.scaling_model import FACTOR, Cluster, Compute, Group, Inputs, Link, collectives
from mnemos.bench.scaling_runs import RANKS

GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    Attributes:
        facts: of the stage, from one rank on its own.
        rounds: by turn ("one step", "many load", "joint network", ...) and round, by quantity; seconds and bytes.
        counted: calls and bytes of each collective in one update on two ranks; None where they were not run.
    """

    facts: Mapping[str, Any]
    rounds: Mapping[str, Sequence[Mapping[str, float]]]
    counted: Mapping[str, list[int]] | None

    @cached_property
    def medians(self) -> dict[str, dict[str, float]]:
        """Medians over the rounds."""
        return {
            turn: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for turn, found in self.rounds.items()
        }

    def each_round(self) -> "list[Measured]":
        """Return every round as if it were the only one."""
        number = len(next(iter(self.rounds.values())))
        return [
            replace(self, rounds={turn: [found[place]] for turn, found in self.rounds.items()})
            for place in range(number)
        ]

    def compute(self, turn: str, core_rate: float | None) -> Compute:
        """Return the compute of turns that begin so ("one" or "many").

        How a step divides is found while waiting after each part; how long it takes, without waiting.
        """
        split = self.medians[f"{turn} split"]
        scale = self.medians[f"{turn} step"]["step_s"] / sum(split.values())
        load_s = self.facts["batch"] / core_rate if core_rate else self.medians[f"{turn} load"]["load_s"]
        return Compute(**{name: scale * seconds for name, seconds in split.items()}, load_s=load_s)

    def cluster(self) -> Cluster:
        """Return this machine as a cluster of one node, from what two ranks found."""
        network = self.medians["joint network"]
        links = {}
        for name, factor in FACTOR.items():
            empty_s, full_s = network[f"{name} empty_s"], network[f"{name} full_s"]
            moved = factor * (RANKS - 1) / RANKS * network["full_bytes"]
            links[name] = Link(latency_s=empty_s, bytes_per_s=moved / max(full_s - empty_s, 1e-3 * full_s))
        return Cluster(ranks_per_node=RANKS, within=links, between=links["all-reduce"])


def inputs_of(
    measured: Measured, *, cores: int, overlap: float, samples_per_core: float | None = None
) -> Inputs:
    """Return the model's inputs.

    Args:
        measured: on this machine.
        cores: of a rank.
        overlap: share of the all-reduce behind the backward pass.
        samples_per_core: read by one core in a second; None takes what was measured.
    """
    facts = measured.facts
    groups = [Group(part=part, values=values) for part, values in facts["groups"]]
    sent = collectives(groups, frozenset(facts["active"]), element_bytes=facts["element_bytes"])
    if measured.counted:
        sent = [replace(one, calls=measured.counted.get(one.name, [one.calls])[0]) for one in sent]
    return Inputs(
        batch=facts["batch"],
        one=measured.compute("one", samples_per_core),
        many=measured.compute("many", samples_per_core),
        collectives=sent,
        overlap=overlap,
        readers=min(facts["readers"], cores),
    )


def planned(measured: Measured, given: argparse.Namespace) -> Cluster:
    """Return the cluster of the table: what flags state, else what was measured here."""
    here = measured.cluster() if measured.counted else None
    within = {}
    for name in FACTOR:
        if here is None or (given.intra_gbps and given.latency_us):
            link = Link(latency_s=1e-6 * given.latency_us, bytes_per_s=GBIT * given.intra_gbps)
        else:
            found = here.within[name]
            link = Link(
                latency_s=1e-6 * given.latency_us if given.latency_us else found.latency_s,
                bytes_per_s=GBIT * given.intra_gbps if given.intra_gbps else found.bytes_per_s,
            )
        within[name] = link
    reduce = within["all-reduce"]
    between = Link(
        latency_s=reduce.latency_s,
        bytes_per_s=GBIT * given.inter_gbps if given.inter_gbps else reduce.bytes_per_s,
    )
    return Cluster(ranks_per_node=given.ranks_per_node, within=within, between=between)


def listed(
    measured: Measured, inputs: Inputs, cluster: Cluster, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for every input: name, value, unit, and how it was got."""
    facts, rows = measured.facts, []
    backend = "NCCL" if facts["device"].startswith("cuda") else "gloo"

    def row(name: str, value: object, unit: str, how: str) -> None:
        rows.append({"name": name, "value": value, "unit": unit, "how": how})

    row("batch", inputs.batch, "samples", f"of a rank, in micro-batches of {facts['micro_batch']}")
    row("threads", facts["threads"], "", "of a rank")
    beside = "beside a second that computes" if measured.counted else "alone"
    for state, compute in (("one rank", inputs.one), ("a rank of several", inputs.many)):
        how = "measured: train_step, " + (
            "as a run of one rank" if state == "one rank" else f"network apart, {beside}"
        )
        for name in ("forward", "backward", "optimizer", "rest"):
            seconds = getattr(compute, f"{name}_s")
            row(f"{name}, {state}", f"{1e3 * seconds:.3f}", "ms", how)
        how = (
            f"stated: --core-rate {given.core_rate:g}" if given.core_rate else "measured: the stage's batches"
        )
        row(f"reading, {state}", f"{inputs.batch / compute.load_s:,.0f}", "samples/s a core", how)
    row(
        "reading processes",
        inputs.readers,
        "a rank",
        f"the setting, at most its {given.cores} cores; 0: adds up",
    )
    row("element", facts["element_bytes"], "bytes", "of a gradient and a weight: precision of the stage")
    for one in inputs.collectives:
        what = "active parts" if one.name == "all-reduce" else "all parts"
        row(one.name, f"{one.num_bytes / 1e6:.3f}", "MB", f"counted from the optimiser's groups: {what}")
        calls = (
            f"counted in an update on {RANKS} ranks"
            if measured.counted
            else "derived: groups, buckets, flags"
        )
        row(f"{one.name} calls", one.calls, "", f"{calls}, ZeRO {facts['zero']}")
    for name, link in cluster.within.items():
        latency = f"measured: {backend}, empty, {RANKS} ranks"
        speed = f"measured: {backend}, the step's bytes, {RANKS} ranks"
        row(
            f"latency, {name}",
            f"{1e6 * link.latency_s:.1f}",
            "us",
            f"stated: --latency-us {given.latency_us:g}" if given.latency_us else latency,
        )
        row(
            f"within a node, {name}",
            f"{link.bytes_per_s / GBIT:.3f}",
            "Gbit/s",
            f"stated: --intra-gbps {given.intra_gbps:g}" if given.intra_gbps else speed,
        )
    row(
        "between nodes",
        f"{cluster.between.bytes_per_s / GBIT:.3f}",
        "Gbit/s a node",
        f"stated: --inter-gbps {given.inter_gbps:g}"
        if given.inter_gbps
        else "ASSUMED: as within a node; give --inter-gbps",
    )
    row("ranks of a node", cluster.ranks_per_node, "", "--ranks-per-node, or this machine's")
    row("overlap", f"{inputs.overlap:.0%}", "of all-reduce", "stated; our DeepSpeed configuration has none")
    row("optimiser", "1/N", "of its time", f"ZeRO {facts['zero']}: every rank has its share")
    return rows
