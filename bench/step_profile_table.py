"""The table of bench/step_profile.py: what every role takes, beside the least it must do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mnemos.bench.step_profile_roles import ROLES, UNPLACED, Breakdown, Role
from mnemos.bench.step_profile_work import Work
from mnemos.engine.plain_table import format_table

Row = dict[str, Any]
_MOST_NAMES = 8  # of a role, kept for people who ask what is in it


def table(found: Breakdown, work: Mapping[str, Work], flops_per_s: float, bytes_per_s: float) -> list[Row]:
    """Return a row for every role that takes time or must do something, and their sum.

    Args:
        found: the measured step.
        work: the least of it, by role.
        flops_per_s: of a matrix product.
        bytes_per_s: of a copy.

    Returns:
        Times in ms, shares and rates; what does not apply is None or missing. `of_product` and `of_copy` are shares of
        the two rates: by FLOPs for matrix products, else by what takes longer.
    """
    taken = dict(found.rows)
    if any(
        is_product(role) and not taken[role].ms for role in work
    ):  # a graph: where they belong cannot be told
        taken, work = _joined(taken), _joined_work(work)
    rows = []
    for role in ROLES:
        one, least = taken[role], work.get(role, Work())
        if not (one.ms or one.host_ms or least.flops or least.bytes):
            continue
        by_flops, by_bytes = 1e3 * least.flops / flops_per_s, 1e3 * least.bytes / bytes_per_s
        row: Row = {"role": role, "ms": one.ms, "share": one.ms / found.step_ms, "calls": one.calls}
        row |= {
            "host_ms": one.host_ms if found.on_device else None,
            "could_ms": max(by_flops, by_bytes) or None,
        }
        row |= {"gflop": least.flops / 1e9 or None, "mb": least.bytes / 1e6 or None}
        if one.ms and least.flops and (is_product(role) or by_flops >= by_bytes):
            row |= {"flop_per_s": 1e3 * least.flops / one.ms, "of_product": by_flops / one.ms}
        elif one.ms and least.bytes:
            row |= {"bytes_per_s": 1e3 * least.bytes / one.ms, "of_copy": by_bytes / one.ms}
        rows.append({**row, "names": dict(one.names.most_common(_MOST_NAMES))})
    summed = ("ms", "calls", "gflop", "mb", "could_ms", *(["host_ms"] if found.on_device else []))
    total: Row = {key: sum(row[key] or 0.0 for row in rows) for key in summed}
    rate = 1e12 * total["gflop"] / total["ms"]
    return [
        *rows,
        {"role": "the step", "share": 1.0, **total, "flop_per_s": rate, "of_product": rate / flops_per_s},
    ]


def is_product(role: str) -> bool:
    """Tell whether a role is one of the matrix products."""
    return role.startswith(UNPLACED)


def _joined(taken: Mapping[str, Role]) -> dict[str, Role]:
    """Return the roles with all matrix products in one."""
    products = [one for role, one in taken.items() if is_product(role)]
    whole = Role(
        ms=sum(one.ms for one in products),
        host_ms=sum(one.host_ms for one in products),
        calls=sum(one.calls for one in products),
        names=sum((one.names for one in products), Counter()),
    )
    return {role: Role() if is_product(role) else one for role, one in taken.items()} | {UNPLACED: whole}


def _joined_work(work: Mapping[str, Work]) -> dict[str, Work]:
    own = {role: one for role, one in work.items() if not is_product(role)}
    return own | {UNPLACED: sum((one for role, one in work.items() if is_product(role)), Work())}


def as_text(rows: Sequence[Row], *, on_device: bool) -> str:
    """Return the table as people read it."""
    scale, unit = (1e12, "TFLOP/s") if rows[-1]["flop_per_s"] > 1e12 else (1e9, "GFLOP/s")
    cells = []
    for row in rows:
        cell = {
            "role": row["role"],
            "ms": f"{row['ms']:.2f}",
            "share": f"{100 * row['share']:.1f} %",
            "calls": f"{row['calls']:.0f}",
            "host ms": _number(row.get("host_ms"), ".2f"),
            "GFLOP": _number(row["gflop"], ",.1f"),
            "MB": _number(row["mb"], ",.1f"),
            "reached": "-",
            "of the machine's": "-",
            "could be ms": _number(row["could_ms"], ".2f"),
        }
        if "flop_per_s" in row:
            cell["reached"] = f"{row['flop_per_s'] / scale:,.1f} {unit}"
            cell["of the machine's"] = f"{100 * row['of_product']:.0f} % of a product"
        elif "bytes_per_s" in row:
            cell["reached"] = f"{row['bytes_per_s'] / 1e9:,.1f} GB/s"
            cell["of the machine's"] = f"{100 * row['of_copy']:.0f} % of a copy   "  # ends below the other
        cells.append(cell)
    names = [name for name in cells[0] if on_device or name != "host ms"]
    # Numbers with their units are words to the table: all but the first column are filled up on the left.
    wide = {name: max(len(name), *(len(cell[name]) for cell in cells)) for name in names[1:]}
    filled = [{name: cell[name].rjust(wide.get(name, 0)) for name in names} for cell in cells]
    return format_table(filled, {name: name.rjust(wide.get(name, 0)) for name in names})


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def headlines(about: Row) -> str:
    """Return what stands above the table."""
    pace = about["batch"] / about["ms"] * 1e3
    more = about["profiled_ms"] / about["ms"] - 1
    what = (
        about["kind"] + " " + about["phase"],
        about["preset"],
        f"batch {about['batch']}",
        about["precision"],
    )
    lines = [
        f"{', '.join(what)}, {about['device']}, {about['threads']} threads",
        f"a step: {about['ms']:.2f} ms ({pace:,.1f} samples/s); under the profiler, which the table cuts up: "
        + f"{about['profiled_ms']:.2f} ms ({100 * more:+.0f} %); means of {about['steps']}",
        f"this machine: matrix product {about['product_flop_per_s'] / 1e12:.3g} TFLOP/s, "
        + f"copy {about['copy_bytes_per_s'] / 1e9:.3g} GB/s",
    ]
    if about["estimate_flop"] is not None:
        reached = about["estimate_flop"] / about["ms"] * 1e3
        lines.append(
            f"the engine's estimate: {about['estimate_flop'] / 1e9:,.1f} GFLOP a step, {reached / 1e12:.3g} TFLOP/s without "
            f"the profiler, {100 * reached / about['product_flop_per_s']:.0f} % of a product"
        )
    return "\n".join(lines)


def detail(rows: Sequence[Row]) -> str:
    """Return the operators or kernels that take most of every role."""
    lines = []
    for row in rows[:-1]:
        names = [f"{name[:60]} {ms:.2f}" for name, ms in row["names"].items() if ms > 0.01 * row["ms"]]
        lines.append(f"{row['role']}: {'; '.join(names[:5]) or '-'}")
    return "\n".join(lines)
