"""Where a step's time goes: a profiler's trace, cut into roles.

Read is the Chrome trace that torch.profiler exports, so a trace of any machine can be cut on any other. Every instant of
the steps belongs to exactly one role: on a CPU the self time of the events of the training thread, on a GPU the kernels
in the order they ran, and what is left between them.

A role is told by the names on the way to an event: the ranges of `step_profile_run.py` (they begin with "mnemos/"), the
operators below them, the kernel at the end. An event of backward is told by the operator of forward that made its node:
both carry the same sequence number.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANGE = "mnemos/"
STEPS = f"{RANGE}steps"  # the range around all profiled steps
SCOPES = ("tokenizer", "encoder", "teacher", "decoder", "head")  # of matrix products
UNPLACED = "products"  # kernels of a CUDA graph: no range is open when it is replayed
BOOKKEEPING, PYTHON, IDLE, OTHER = "DeepSpeed, autograd", "Python", "device idle", "other"

_NODE = "autograd::engine::evaluate_function: "
_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "privateuse1_runtime"}
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_BOOKKEEPING = {f"{RANGE}{name}" for name in ("deepspeed", "backward", "update")}

_PRODUCTS = "\0products"  # replaced by the scope
RULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(  # the first that is found in the names decides
    (role, re.compile(pattern, re.IGNORECASE))
    for role, pattern in (
        ("communication", r"nccl|gloo:|c10d::|record_param_comms"),
        ("augmentation, pixels", r"mnemos/pixels|gather_patches|random_patch_ids|mirror|resized_crop"),
        ("optimiser", r"mnemos/update|Optimizer\.step|adamw"),
        # Flat parameters to their pieces and back, and what DeepSpeed does with finished gradients beside the nodes.
        ("weights, gradients", r"AccumulateGrad|_Unflatten|mnemos/backward(?!.*evaluate_function)"),
        ("attention", r"Definition|scaled_dot_product|attention|fmha|flash|varlen"),
        (_PRODUCTS, r"aten::\w*(mm|matmul)\b|(?<![a-z])linear(_pointwise|Backward\d?)?\b|gemm|cutlass|nvjet|cublas|xmma"),
        ("norms, residuals", r"residual_norm|layer_norm|addcmul"),
        ("GELU", r"gelu"),
        ("losses", r"masked_patch_mse|feature_mse|masked_lm_loss|softmax_gradient|scale_gradient"),
        ("placing tokens", r"gather_tokens|decoder_tokens|place_tokens|embedding|segment_reduce|mnemos/tokenizer"),
        ("placing tokens", r"aten::(index|cat|gather|scatter)|(Index|Cat|Gather)Backward"),
        ("copies, casts, fills", r"aten::(copy_|to|_to_copy|clone|contiguous|reshape|zero|fill)|memcpy|memset"),
        ("compiled, fused", r"Compiled|triton_"),  # a compiled region whose kernel does not say what it holds
    )
)  # fmt: skip
ROLES = (
    *(f"products: {scope}" for scope in SCOPES), UNPLACED, "attention", "norms, residuals", "GELU", "losses",
    "placing tokens", "augmentation, pixels", "optimiser", "weights, gradients", "communication", "copies, casts, fills",
    "compiled, fused",
    BOOKKEEPING, PYTHON, IDLE, OTHER,
)  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Event:
    """An event of one host thread; times in microseconds."""

    name: str
    start: float
    stop: float
    sequence: int | None
    correlation: int | None
    parent: "Event | None" = None
    inside_us: float = 0.0  # of its children
    _path: str | None = None

    @property
    def self_us(self) -> float:
        """Return its time without its children's."""
        return self.stop - self.start - self.inside_us


@dataclass(kw_only=True)
class Role:
    """One role's part of a mean step.

    Attributes:
        ms: of the CPU thread, or of the device.
        host_ms: of host threads, where `ms` is the device's.
        calls: operators or kernels of a step.
        names: milliseconds of a step by operator or kernel.
    """

    ms: float = 0.0
    host_ms: float = 0.0
    calls: float = 0.0
    names: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """A mean step in roles; the rows' `ms` add up to `step_ms`."""

    step_ms: float
    on_device: bool
    rows: dict[str, Role]

    @property
    def other_share(self) -> float:
        """Return the part of the step that no rule knows."""
        return self.rows[OTHER].ms / self.step_ms


def read_trace(file: Path) -> list[dict[str, Any]]:
    """Return the complete events of a Chrome trace, gzipped or not."""
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        return [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]


def break_down(events: Iterable[dict[str, Any]], steps: int) -> Breakdown:
    """Cut a trace into roles.

    Args:
        events: complete events of a trace with one range `STEPS` in it.
        steps: done in that range.

    Raises:
        ValueError: the trace has no such range.
    """
    given = list(events)
    threads = _threads([event for event in given if event.get("cat") in _HOST])
    root, main = next(
        ((event, thread) for thread, own in threads.items() for event in own if event.name == STEPS),
        (None, ""),
    )
    if root is None:
        raise ValueError(f"the trace has no range {STEPS!r}; record it as bench/step_profile_run.py does")
    hosts = {
        thread: [one for one in own if root.start <= one.start < root.stop] for thread, own in threads.items()
    }
    everything = [event for own in hosts.values() for event in own]
    made = _makers(hosts[main])
    kernels = [event for event in given if event.get("cat") in _DEVICE]
    rows = {role: Role() for role in ROLES}
    _add_host(rows, hosts[main], made, steps, on_device=bool(kernels))
    if kernels:
        waited = 0.0  # backward has a thread of its own; the main one waits for it
        for thread, own in hosts.items():
            if thread != main and any(event.name.startswith(_NODE) for event in own):
                waited += _add_host(rows, own, made, steps, on_device=True)
        rows[BOOKKEEPING].host_ms -= waited
        _add_kernels(rows, kernels, everything, root, made, steps)
    step_ms = (root.stop - root.start) / steps / 1e3
    total = sum(row.ms for row in rows.values())
    assert abs(total - step_ms) < 1e-3 * step_ms, f"the roles add up to {total} ms, the step is {step_ms} ms"
    return Breakdown(step_ms=step_ms, on_device=bool(kernels), rows=rows)


def role_of(names: str) -> str:
    """Return the role of what ran below these names, outermost first, joined by " > "."""
    role = next((role for role, pattern in RULES if pattern.search(names)), OTHER)
    if role != _PRODUCTS:
        return role
    scopes = re.findall(rf"{RANGE}(\w+)", names)
    inner = next((scope for scope in reversed(scopes) if scope in SCOPES), None)
    if inner is None:
        inner = "encoder" if "model" in scopes else None
    return UNPLACED if inner is None else f"products: {inner}"


def _threads(events: Sequence[dict[str, Any]]) -> dict[Any, list[Event]]:
    """Return the events by thread, in the order they began, each with its parent."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for one in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
        given = one.get("args", {})
        sequence, correlation = given.get("Sequence number"), given.get("correlation")
        event = Event(
            name=one["name"], start=one["ts"], stop=one["ts"] + one["dur"], sequence=sequence, correlation=correlation
        )  # fmt: skip
        own = threads[one["tid"]]
        parent = own[-1] if own else None
        while parent is not None and parent.stop <= event.start:
            parent = parent.parent
        if parent is not None:
            event.stop = min(event.stop, parent.stop)  # times are rounded each for itself
            parent.inside_us += event.stop - event.start
            event.parent = parent
        own.append(event)
    return threads


def _makers(events: Sequence[Event]) -> dict[int, list[Event]]:
    """Return the events of a thread by sequence number, in the order they began, those of backward left out."""
    found: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        backward = event.name.startswith(_NODE) or (
            event.parent is not None and event.parent.name.startswith(_NODE)
        )
        if event.sequence is not None and event.sequence >= 0 and not backward:
            found[event.sequence].append(event)
    return found


def _path(event: Event, made: dict[int, list[Event]]) -> str:
    """Return the names on the way to an event; for a node of backward the way to what made it."""
    if event._path is None:
        above = "" if event.parent is None else _path(event.parent, made)
        if event.name.startswith(_NODE) and event.sequence is not None:
            # The last to begin with this number made the node; others only saw that it was next.
            makers = [one for one in made.get(event.sequence, ()) if one.start < event.start]
            above = _path(makers[-1], made) if makers else above
        event._path = f"{above} > {event.name}" if above else event.name
    return event._path


def _host_role(event: Event, made: dict[int, list[Event]]) -> str:
    """Return the role of an event's own time: what Python, DeepSpeed and autograd do between operators has one."""
    if event.name.startswith(_NODE) or event.name in _BOOKKEEPING:
        return BOOKKEEPING
    return PYTHON if event.name.startswith(RANGE) else role_of(_path(event, made))


def _add_host(
    rows: dict[str, Role],
    events: Sequence[Event],
    made: dict[int, list[Event]],
    steps: int,
    *,
    on_device: bool,
) -> float:
    """Add the own times of a thread's events; return the milliseconds of a step they have together."""
    total = 0.0
    for event in events:
        row, ms = rows[_host_role(event, made)], event.self_us / steps / 1e3
        total += ms
        row.host_ms += ms
        if not on_device:
            row.ms += ms
            row.calls += (event.inside_us == 0.0) / steps
            row.names[event.name] += ms  # type: ignore[assignment]  # typeshed counts in whole numbers
    return total


def _add_kernels(
    rows: dict[str, Role],
    kernels: Sequence[dict[str, Any]],
    hosts: Sequence[Event],
    root: Event,
    made: dict[int, list[Event]],
    steps: int,
) -> None:
    """Add the kernels that the steps launched, and the time between them."""
    launched = {event.correlation: event for event in hosts if event.correlation is not None}
    spans, roles = [], []
    for kernel in kernels:
        launch = launched.get(kernel.get("args", {}).get("correlation"))
        start, stop = max(kernel["ts"], root.start), min(kernel["ts"] + kernel["dur"], root.stop)
        if start >= stop:
            continue
        names = f"{_path(launch, made)} > {kernel['name']}" if launch else kernel["name"]
        role = role_of(names)
        spans.append((start, stop, role == "communication"))
        roles.append((role, kernel["name"]))
    busy = 0.0
    for (role, name), own_us in zip(roles, exclusive(spans), strict=True):
        row, ms = rows[role], own_us / steps / 1e3
        busy += ms
        row.ms += ms
        row.calls += 1 / steps
        row.names[name] += ms  # type: ignore[assignment]
    rows[IDLE].ms = (root.stop - root.start) / steps / 1e3 - busy


def exclusive(spans: Sequence[tuple[float, float, bool]]) -> list[float]:
    """Return how long each span has its time for itself: every instant is counted once.

    Where spans overlap, the one that began first has the instant; those in the background (third value) have only what
    no other covers: communication costs what it does not hide.
    """
    owned = [0.0] * len(spans)
    taken_from: list[float] = []  # disjoint, ascending: what is taken so far
    taken_to: list[float] = []
    for background in (False, True):
        until = float("-inf")
        added = []
        for place in sorted(
            (n for n, span in enumerate(spans) if span[2] == background), key=lambda n: spans[n][0]
        ):
            start, stop = max(spans[place][0], until), spans[place][1]
            if start >= stop:
                continue
            until = stop
            added.append((start, stop))
            owned[place] = stop - start - _covered(taken_from, taken_to, start, stop)
        taken_from, taken_to = [span[0] for span in added], [span[1] for span in added]
    return owned


def _covered(begins: Sequence[float], ends: Sequence[float], start: float, stop: float) -> float:
    """Return how much of a span lies in disjoint ascending ones."""
    total, place = 0.0, bisect_right(ends, start)
    while place < len(begins) and begins[place] < stop:
        total += min(ends[place], stop) - max(begins[place], start)
        place += 1
    return total
