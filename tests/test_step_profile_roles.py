"""How bench/step_profile.py cuts a trace into roles, and the least work of a step."""

from typing import Any

import pytest

from mnemos.bench.step_profile_roles import (
    BOOKKEEPING,
    IDLE,
    OTHER,
    PYTHON,
    ROLES,
    RULES,
    STEPS,
    UNPLACED,
    Breakdown,
    break_down,
    exclusive,
    role_of,
)
from mnemos.bench.step_profile_work import Load, Work, work_by_role
from mnemos.engine.settings import resolve

NODE = "autograd::engine::evaluate_function: "


def host(
    name: str, start: float, stop: float, *, tid: int = 1, cat: str = "cpu_op", **given: int
) -> dict[str, Any]:
    """Return an event of a host thread, as a trace has it."""
    names = {"sequence": "Sequence number", "correlation": "correlation"}
    known = {names[key]: value for key, value in given.items()}
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": stop - start, "args": known}


def kernel(name: str, start: float, stop: float, correlation: int) -> dict[str, Any]:
    """Return a kernel of a device."""
    known = {"correlation": correlation}
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "tid": 7,
        "ts": start,
        "dur": stop - start,
        "args": known,
    }


def ms_of(found: Breakdown) -> dict[str, float]:
    """Return the roles that take time."""
    return {role: round(row.ms, 6) for role, row in found.rows.items() if round(row.ms, 6)}


def test_a_steps_own_times_add_up_and_backward_follows_forward() -> None:
    trace = [
        host("aten::mm", 0, 900),  # of the step before
        host(STEPS, 1000, 2000),
        host("mnemos/model", 1100, 1400),
        host("mnemos/decoder", 1150, 1350),
        host("aten::linear", 1200, 1300, sequence=5),
        host("aten::t", 1210, 1215, sequence=5),
        host("aten::addmm", 1220, 1300, sequence=6),
        host("aten::view", 1310, 1320, sequence=7),  # saw the same number as the next, whose node it is
        host("aten::gelu", 1320, 1350, sequence=7),
        host("mnemos/backward", 1400, 1800),
        host(f"{NODE}SomeBackward", 1410, 1500, sequence=7),
        host("aten::mul", 1420, 1500),
        host(f"{NODE}AddmmBackward0", 1500, 1700, sequence=6),
        host("aten::mm", 1510, 1690),
        host(f"{NODE}torch::autograd::AccumulateGrad", 1700, 1760),
        host("aten::copy_", 1710, 1760),
        host("mnemos/update", 1800, 1980),
        host("aten::_fused_adamw_", 1810, 1960),
        host("aten::frobnicate", 1985, 1990),
        host("gloo:allreduce", 1000, 2000, tid=3),  # another thread's, beside it
    ]
    found = break_down(trace, 2)
    assert ms_of(found) == {  # of one step: halves
        "products: decoder": (100 + 180) / 2e3,
        "GELU": (30 + 80) / 2e3,
        "optimiser": 150 / 2e3,
        "weights, gradients": 50 / 2e3,
        BOOKKEEPING: (400 - 90 - 200 - 60 + 10 + 20 + 10 + 30) / 2e3,
        PYTHON: (1000 - 300 - 400 - 180 - 5 + 100 + 200 - 100 - 40) / 2e3,
        OTHER: (10 + 5) / 2e3,
    }
    assert sum(row.ms for row in found.rows.values()) == pytest.approx(found.step_ms) == 0.5
    assert found.rows["products: decoder"].calls == 1.5  # in two steps: t, addmm, mm
    assert not found.on_device


def gpu_trace() -> list[dict[str, Any]]:
    """Return a step on a device: products, a transfer half hidden behind them, a graph, an unknown kernel."""
    return [
        host(STEPS, 1000, 2000, cat="user_annotation"),
        host("mnemos/model", 1010, 1100, cat="user_annotation"),
        host("aten::addmm", 1020, 1080, sequence=3),
        host("cudaLaunchKernel", 1030, 1040, cat="cuda_runtime", correlation=11),
        host("mnemos/backward", 1100, 1500, cat="user_annotation"),
        host(f"{NODE}AddmmBackward0", 1110, 1300, tid=2, sequence=3),
        host("aten::mm", 1120, 1280, tid=2),
        host("cuLaunchKernelEx", 1130, 1140, tid=2, cat="cuda_driver", correlation=12),
        host("cudaGraphLaunch", 1510, 1520, cat="cuda_runtime", correlation=13),
        kernel("nvjet_tst_128x256", 500, 900, 1),  # of the step before
        kernel("nvjet_tst_128x256", 1050, 1250, 11),
        kernel("ncclDevKernel_AllReduce", 1200, 1450, 14),
        kernel("elementwise_kernel<mul>", 1250, 1350, 12),
        kernel("_layer_scale_residual_norm_kernel", 1600, 1640, 13),
        kernel("sm90_xmma_gemm_bf16", 1640, 1740, 13),
        kernel("what_is_this", 1740, 1750, 13),
    ]


def test_on_a_device_kernels_count_and_what_is_left_is_idle() -> None:
    found = break_down(gpu_trace(), 1)
    assert found.on_device
    assert ms_of(found) == {
        "products: encoder": 0.3,  # forward's, and backward's by its operator, whatever the kernel's name
        "communication": 0.1,  # of 0.25, what no kernel hides
        "norms, residuals": 0.04,
        UNPLACED: 0.1,
        OTHER: 0.01,
        IDLE: 0.45,
    }
    assert found.other_share == pytest.approx(0.01)
    host_ms = {role: row.host_ms for role, row in found.rows.items()}
    assert sum(host_ms.values()) == pytest.approx(
        1.0
    )  # backward's own thread worked while the main one waited
    assert host_ms["products: encoder"] == pytest.approx(0.06 + 0.16)
    assert host_ms[BOOKKEEPING] == pytest.approx(0.4 - 0.19 + 0.03)


def test_times_that_were_rounded_apart_take_nothing_from_their_parent() -> None:
    trace = [
        host(STEPS, 0, 1000),
        host("mnemos/model", 0, 1000),
        host("aten::mm", 10, 1001),
        host("aten::copy_", 900, 1002),
    ]
    found = break_down(trace, 1)
    assert ms_of(found) == {PYTHON: 0.01, "products: encoder": 0.99}


def test_a_trace_without_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="no range 'mnemos/steps'"):
        break_down([host("aten::mm", 0, 1)], 1)


def test_every_instant_of_overlapping_spans_counts_once() -> None:
    spans = [(0.0, 10.0, True), (2.0, 5.0, False), (4.0, 6.0, False), (4.5, 5.5, False), (9.0, 12.0, True)]
    owned = exclusive(spans)
    assert owned == [6.0, 3.0, 1.0, 0.0, 2.0] and sum(owned) == 12.0


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("mnemos/model > mnemos/decoder > mnemos/head > aten::linear > aten::addmm", "products: head"),
        ("mnemos/teacher > mnemos::linear > aten::mkldnn_linear", "products: teacher"),
        ("mnemos/model > _Linear", "products: encoder"),
        ("mnemos/model > mnemos/head > mnemos::masked_lm_loss > aten::addmm", "products: head"),
        ("mnemos/model > mnemos/head > mnemos::masked_lm_loss > aten::exp", "losses"),
        ("mnemos/model > _Definition > aten::bmm", "attention"),
        ("mnemos/model > mnemos::layer_scale_residual_norm > aten::copy_", "norms, residuals"),
        ("mnemos/model > mnemos/tokenizer > aten::add", "placing tokens"),
        ("mnemos/pixels > aten::bmm", "augmentation, pixels"),
        ("mnemos/update > c10d::allreduce_ > gloo:all_reduce", "communication"),
        ("mnemos/update > aten::copy_", "optimiser"),
        ("mnemos/backward > aten::cat", "weights, gradients"),
        ("mnemos/model > _Unflatten > aten::slice", "weights, gradients"),
        ("mnemos/backward > autograd::engine::evaluate_function: Strange > aten::mul", OTHER),
        ("mnemos/model > aten::upsample_trilinear3d", OTHER),
        ("cudaGraphLaunch > triton_poi_fused_gelu_2", "GELU"),
        ("mnemos/model > Torch-Compiled Region: 0/0 > CompiledFunction", "compiled, fused"),
        ("mnemos/model > Torch-Compiled Region: 0/0 > aten::addmm", "products: encoder"),
        ("Memcpy HtoD (Pinned -> Device)", "copies, casts, fills"),
    ],
)
def test_roles_by_name(names: str, role: str) -> None:
    assert role_of(names) == role


def test_every_rule_leads_to_a_row() -> None:
    assert {role for role, _ in RULES if not role.startswith("\0")} <= set(ROLES)


def load(places: int, seen: int, values: int, stored: int) -> Load:
    """Return the load of 128 samples at the base preset's sizes."""
    B = 128
    return Load(
        samples=B, tokens=B * (1 + seen), pairs=B * (1 + seen) ** 2, seen=B * seen, places=places,
        scored=B * (places - seen), values=values, patch_values=values, raw_bytes=B * stored, crops=True, estimate={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "phase", "gflop"),
    [
        ("image", "pretext", 56.5),
        ("image", "rehearsal", 34.5),
        ("volume", "pretext", 42.7),
        ("volume", "rehearsal", 26.0),
    ],
)
def test_the_least_flops_are_those_counted_by_hand(kind: str, phase: str, gflop: float) -> None:
    one = load(196, 49, 768, 224 * 224) if kind == "image" else load(144, 36, 4096, 2 * 16 * 192 * 192)
    work = work_by_role(one, resolve("base", {}), phase, bf16=True, parameters=1000)
    assert sum(least.flops for least in work.values()) / 128e9 == pytest.approx(gflop, abs=0.06)
    assert work["optimiser"] == Work(0, 28_000)
    assert ("products: teacher" in work) == (phase == "rehearsal")
    # two norms a block; 10 streams each in training, 4 more for the teacher; the decoder's beside them
    streams = 2 * 12 * (10 if phase == "pretext" else 14) * 768 * one.tokens
    assert work["norms, residuals"].bytes >= 2 * streams
    assert (work["norms, residuals"].bytes == 2 * streams) == (phase == "rehearsal")


def test_the_least_of_a_text_step() -> None:
    one = Load(
        samples=10, tokens=750, pairs=60_000, seen=0, places=0, scored=112, values=30_000, patch_values=0,
        raw_bytes=0, crops=False, estimate={},
    )  # fmt: skip
    work = work_by_role(one, resolve("base", {}), "pretext", bf16=False, parameters=0)
    D = 768
    assert work["products: head"].flops == 6 * 112 * D * (D + 30_000)
    assert work["products: encoder"].flops == 3 * 12 * 24 * D**2 * 750
    assert work["attention"].flops == 3 * 12 * 4 * 60_000 * D
    assert work["losses"] == Work(0, 2 * 4 * 112 * 30_000)
    assert not {"products: tokenizer", "products: decoder", "augmentation, pixels"} & set(work)
    unlearned = work_by_role(one, resolve("base", {}), "embedding", bf16=False, parameters=0)
    assert unlearned["products: encoder"].flops * 3 == work["products: encoder"].flops
    assert not {"products: head", "losses", "optimiser"} & set(unlearned)
