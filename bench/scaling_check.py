"""The model held against one and two real ranks."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from mnemos.bench.scaling_inputs import Measured
from mnemos.bench.scaling_model import Inputs, predict
from mnemos.bench.scaling_runs import RANKS

SIZES = 0.01  # bytes are no estimate: what differs is padding, and flags of a few bytes


@dataclass(frozen=True, kw_only=True)
class Check:
    """One quantity, predicted and measured.

    Attributes:
        difference: relative, positive where the model is too high; of several rounds the median of their own, since both
            sides of a round met the same load.
        limit: the most that is allowed whatever --limit says.
    """

    what: str
    unit: str
    predicted: float
    measured: float
    difference: float
    limit: float = math.inf

    def sentence(self) -> str:
        """Return it for people."""
        numbers = f"predicted {self.predicted:,.1f}, measured {self.measured:,.1f} {self.unit}"
        return f"{self.what}: {numbers}, {self.difference:+.1%}"


def checks(measured: Measured, inputs_of: Callable[[Measured], Inputs]) -> list[Check]:
    """Return samples/s on one rank and on two, and the bytes of each collective on two.

    Here the network is this machine's own, whatever flags state for another.

    Args:
        measured: all rounds.
        inputs_of: gives the model's inputs from what was measured.
    """
    assert measured.counted is not None
    found = []
    for ranks, turn in ((1, "one updates"), (RANKS, "joint updates")):
        pairs = []
        for one in measured.each_round():
            inputs = inputs_of(one)
            rate = ranks * inputs.batch / one.medians[turn]["update_s"]
            pairs.append((predict(inputs, one.cluster(), ranks).samples_per_s, rate))
        found.append(
            Check(
                what=f"{ranks} rank{'s' * (ranks > 1)}",
                unit="samples/s",
                predicted=statistics.median(predicted for predicted, _ in pairs),
                measured=statistics.median(rate for _, rate in pairs),
                difference=statistics.median(predicted / rate - 1 for predicted, rate in pairs),
            )
        )
    for collective in inputs_of(measured).collectives:
        _, num_bytes = measured.counted.get(collective.name, [0, 0])
        found.append(
            Check(
                what=f"bytes of {collective.name}",
                unit="kB",
                predicted=collective.num_bytes / 1e3,
                measured=num_bytes / 1e3,
                difference=collective.num_bytes / num_bytes - 1 if num_bytes else math.inf,
                limit=SIZES,
            )
        )
    return found
