"""What a step takes on N ranks: arithmetic only, no measurement. bench/scaling.py fills it in.

    step = max(compute + load + exposed network, reading processes)

- compute: forward, backward and the rest as measured on one rank; the optimiser's part divided by the ranks, since
  ZeRO 1 and 2 give each rank its share of the moments.
- load: reading in the training process itself (no reading processes) adds to the step; reading processes work beside
  it and bound it only where they are slower.
- network: what DeepSpeed 0.19 does under engine/deepspeed_config.py, which leaves `overlap_comm` off. Gradients of the
  active parts are all-reduced in buckets after the backward pass (also under ZeRO 2, whose buckets hold slices of
  several ranks), then the weights of every group are gathered, of idle parts too, one call a group. Nothing of it hides
  behind compute, unless an overlap is stated.
- a collective takes latency * log2(ranks) + factor * (ranks - 1) / ranks * bytes / bandwidth, factor 2 for an all-reduce
  and 1 for an all-gather: the bytes a ring moves (Patarasuk and Yuan, 2009, section 3). Over nodes it is one such
  term within the nodes and one between them, where all ranks of a node share its adapters.

Not in it: ranks that wait for a slower one, other traffic on the network, switches with too few links.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Name = Literal["all-reduce", "all-gather"]
FACTOR: dict[Name, int] = {"all-reduce": 2, "all-gather": 1}
FLAGS = 1  # all-reduces of one number: whether a gradient is not finite on any rank
BUCKET = 500_000_000  # gradients of one all-reduce: DeepSpeed's reduce_bucket_size, which we leave as it is


@dataclass(frozen=True, kw_only=True)
class Group:
    """One parameter group: the part of the model it belongs to, and how many values it has."""

    part: str
    values: int


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What a step sends in one kind of collective: bytes of the whole tensors (not of a rank's share), and calls."""

    name: Name
    num_bytes: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a collective over it costs: seconds of an empty one between two, and bytes/s that a ring moves."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, collective: Collective, ranks: int) -> float:
        """Return the time of a collective over so many ranks or nodes."""
        if ranks == 1:
            return 0.0
        moved = FACTOR[collective.name] * (ranks - 1) / ranks * collective.num_bytes
        return collective.calls * self.latency_s * math.log2(ranks) + moved / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where it runs: ranks of a node, the links within it by collective, the link between nodes (all of a node's adapters)."""

    ranks_per_node: int
    within: Mapping[Name, Link]
    between: Link

    def nodes(self, ranks: int) -> int:
        """Return how many nodes so many ranks fill."""
        return -(-ranks // self.ranks_per_node)

    def seconds(self, collective: Collective, ranks: int) -> float:
        """Return the time of a collective over the ranks: within the nodes, then between them."""
        inside = min(ranks, self.ranks_per_node)
        outside = self.between.seconds(collective, self.nodes(ranks))
        return self.within[collective.name].seconds(collective, inside) + outside


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds of an update on one rank, network apart.

    Attributes:
        forward_s, backward_s, optimizer_s: of it; 0 where the step cannot be split (a graph).
        rest_s: what is left of the step: copies to the device, gradients into DeepSpeed's buffers, its own work.
        load_s: reading and decoding the batch on one core.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float
    rest_s: float
    load_s: float

    def step_s(self, ranks: int) -> float:
        """Return the step without reading and network; the optimiser's state is divided over the ranks."""
        return self.forward_s + self.backward_s + self.rest_s + self.optimizer_s / ranks


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All the model needs.

    Attributes:
        batch: samples of an update on one rank.
        one: compute of a run of one rank, for which DeepSpeed does less.
        many: compute of a rank of several, beside a neighbour that computes as well: shared memory, caches, power.
        collectives: of one update.
        overlap: share of the gradients' all-reduce that hides behind the backward pass.
        readers: reading processes that have a core each, of one rank; 0 reads in the training process.
    """

    batch: int
    one: Compute
    many: Compute
    collectives: Sequence[Collective]
    overlap: float
    readers: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step: samples/s of all ranks, efficiency against one rank, seconds of its shares, and what bounds it."""

    ranks: int
    nodes: int
    samples_per_s: float
    efficiency: float
    step_s: float
    compute_s: float
    network_s: float
    loader_s: float
    bound: Literal["compute", "network", "loader"]


def collectives(groups: Sequence[Group], active: frozenset[str], *, element_bytes: int) -> list[Collective]:
    """Return what a step sends under ZeRO 1 or 2 without overlap.

    Args:
        groups: of the optimiser.
        active: parts that the step trains.
        element_bytes: of a gradient and of a weight as the ranks compute with them, 2 in bf16.
    """
    trained = sum(group.values for group in groups if group.part in active)
    everything = sum(group.values for group in groups)
    return [
        Collective(
            name="all-reduce", num_bytes=trained * element_bytes, calls=math.ceil(trained / BUCKET) + FLAGS
        ),
        Collective(name="all-gather", num_bytes=everything * element_bytes, calls=len(groups)),
    ]


def network_s(inputs: Inputs, cluster: Cluster, ranks: int, backward_s: float) -> float:
    """Return the time of the collectives that does not hide behind the backward pass."""
    exposed = 0.0
    for collective in inputs.collectives:
        seconds = cluster.seconds(collective, ranks)
        if collective.name == "all-reduce":
            seconds -= min(inputs.overlap * seconds, backward_s)
        exposed += seconds
    return exposed


def predict(inputs: Inputs, cluster: Cluster, ranks: int) -> Step:
    """Return the step on so many ranks, each with the same batch (weak scaling)."""
    step = _step(inputs, cluster, ranks)
    one = _step(inputs, cluster, 1)
    return Step(**{**step.__dict__, "efficiency": step.samples_per_s / (ranks * one.samples_per_s)})


def _step(inputs: Inputs, cluster: Cluster, ranks: int) -> Step:
    compute = inputs.one if ranks == 1 else inputs.many
    compute_s = compute.step_s(ranks)
    sent_s = network_s(inputs, cluster, ranks, compute.backward_s)
    if inputs.readers:
        loader_s = compute.load_s / inputs.readers
        step_s = max(compute_s + sent_s, loader_s)
        waits = loader_s > compute_s + sent_s
    else:
        loader_s = compute.load_s
        step_s = compute_s + sent_s + loader_s
        waits = loader_s > max(compute_s, sent_s)
    return Step(
        ranks=ranks,
        nodes=cluster.nodes(ranks),
        samples_per_s=ranks * inputs.batch / step_s,
        efficiency=1.0,
        step_s=step_s,
        compute_s=compute_s,
        network_s=sent_s,
        loader_s=loader_s,
        bound="loader" if waits else "network" if sent_s > compute_s else "compute",
    )
