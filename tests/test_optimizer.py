"""AdamW by parts: who decays, who takes part in which step, and that the others stay as they are, bit for bit."""

from pathlib import Path

import pytest
import torch
from test_objectives import Bench
from tiny_data import tiny_settings
from torch import Tensor

from mnemos.engine.objectives import Pretrainer
from mnemos.engine.optimizer import (
    PartAdamW,
    active_parts,
    parameter_groups,
    part_of,
    rate_table,
)
from mnemos.engine.preparing import Phase
from mnemos.engine.slots import learning_rate

STEPS: list[tuple[str, Phase]] = [
    ("report", "pretext"),
    ("xray", "pretext"),
    ("report", "rehearsal"),
    ("ct", "pretext"),
    ("xray", "rehearsal"),
    ("ct", "rehearsal"),
    ("pathology", "pretext"),
]
TRAINING = tiny_settings().training


def backward(bench: Bench, model: Pretrainer, phase: Phase) -> None:
    """Compute a real step's gradients; parameters that took no part have none."""
    model.zero_grad(set_to_none=True)
    bench.loss(model, bench.rows(bench.raw(list(range(8))), phase), phase).backward()


def snapshot(model: Pretrainer, optimizer: PartAdamW) -> dict[str, dict[str, Tensor]]:
    """Return value, moments and step count of every parameter by name."""
    return {
        name: {"value": parameter.detach().clone()}
        | {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }


def test_groups_hold_every_parameter_once_and_matrices_alone_decay(tiny_sets: Path) -> None:
    model = Bench(tiny_sets, "report").model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, TRAINING)
    assert sorted(names[id(parameter)] for group in groups for parameter in group["params"]) == sorted(
        names.values()
    )
    for group in groups:
        for parameter in group["params"]:
            assert part_of(names[id(parameter)]) == group["part"]
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), names[id(parameter)]
    still = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"encoder.stem.cls", "encoder.blocks.0.scale_1", "image_decoder.stem.mask_token"} <= still
    assert all("norm" in name or "bias" in name or name.split(".")[-1] in _ONE_DIMENSIONAL for name in still)
    assert {part_of(name) for name in names.values()} == {
        "blocks", "stem", "decoder", "tokenizer.image", "tokenizer.volume", "tokenizer.text",
        "head.image", "head.volume", "head.text",
    }  # fmt: skip


_ONE_DIMENSIONAL = ("scale_1", "scale_2", "cls", "mask_token", "token_type")


def test_a_parameter_of_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"projector\.weight"):
        part_of("projector.weight")


@pytest.mark.parametrize(("name", "phase"), STEPS)
def test_active_parts_are_those_with_a_gradient(tiny_sets: Path, name: str, phase: Phase) -> None:
    bench = Bench(tiny_sets, name)
    model = bench.model()
    backward(bench, model, phase)
    kind = bench.shards.manifest.kind
    gradients = {full_name: parameter.grad for full_name, parameter in model.named_parameters()}
    taking_part = {part_of(full_name) for full_name, gradient in gradients.items() if gradient is not None}
    assert taking_part == active_parts(kind, phase)
    for full_name, gradient in gradients.items():  # and a part is active as a whole
        if part_of(full_name) in taking_part:
            assert gradient is not None and gradient.abs().sum() > 0, f"{full_name} has no part in the loss"


def test_idle_parts_keep_value_and_moments_bit_for_bit(tiny_sets: Path) -> None:
    benches = {name: Bench(tiny_sets, name) for name, _ in STEPS}
    model = benches["report"].model()
    optimizer = PartAdamW(parameter_groups(model, TRAINING), TRAINING)
    optimizer.set_rate(1e-2)
    optimizer.step()
    before = snapshot(model, optimizer)
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, phase in [*STEPS, *STEPS[::-1]]:
        bench = benches[name]
        backward(bench, model, phase)
        for parameter in model.parameters():  # what DeepSpeed makes of a missing gradient, or worse
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 7.0)
        active = active_parts(bench.shards.manifest.kind, phase)
        optimizer.active = active
        optimizer.step()
        after = snapshot(model, optimizer)
        for parameter, state in after.items():
            unchanged = [key for key, value in state.items() if torch.equal(value, before[parameter][key])]
            expected = [] if part_of(parameter) in active else ["value", "step", "exp_avg", "exp_avg_sq"]
            assert unchanged == expected, f"{name} {phase}: {parameter}"
        before = after
    assert all(not torch.equal(value, initial[name]) for name, value in model.named_parameters())
    counts = {part_of(name): int(state["step"]) for name, state in before.items()}
    assert (counts["blocks"], counts["decoder"], counts["head.text"], counts["tokenizer.image"]) == (
        14,
        6,
        2,
        6,
    )


def test_nothing_moves_before_the_first_step(tiny_sets: Path) -> None:
    model = Bench(tiny_sets, "report").model()
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = PartAdamW(parameter_groups(model, TRAINING), TRAINING)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # DeepSpeed does this while it wraps the optimiser
    for name, state in snapshot(model, optimizer).items():
        assert torch.equal(state["value"], initial[name])
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 0


def test_active_parts_move_as_adamw_moves_them(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "xray")
    ours, plain = bench.model(), bench.model()
    optimizer = PartAdamW(parameter_groups(ours, TRAINING), TRAINING)
    reference = torch.optim.AdamW(
        [
            {key: group[key] for key in ("params", "weight_decay")}
            for group in parameter_groups(plain, TRAINING)
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    optimizer.active = active_parts("image", "pretext")
    for rate in (1e-3, 3e-3, 2e-3):
        optimizer.set_rate(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        for model, step in ((ours, optimizer.step), (plain, reference.step)):
            backward(bench, model, "pretext")
            step()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def moved(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> set[str]:
    """Return the names of the parameters of which anything changed."""
    return {
        name
        for name, state in before.items()
        if not all(torch.equal(value, after[name][key]) for key, value in state.items())
    }


@pytest.mark.parametrize("one_by_one", [False, True], ids=["all groups", "group by group, as ZeRO"])
def test_nothing_moves_where_the_flag_is_set_and_all_does_after(tiny_sets: Path, one_by_one: bool) -> None:
    bench = Bench(tiny_sets, "xray")
    model = bench.model()
    optimizer = PartAdamW(parameter_groups(model, TRAINING), TRAINING)
    optimizer.found_inf = torch.zeros(())
    optimizer.use_rates(rate_table(4, 1e-2, 0.0))
    optimizer.active = active_parts("image", "pretext")
    seen = []
    for step, found in enumerate((0.0, 1.0, 1.0, 0.0)):
        backward(bench, model, "pretext")
        if found:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad[..., 0] = torch.nan
        optimizer.found_inf.fill_(found)
        optimizer.set_update(step)
        before = snapshot(model, optimizer)
        groups = optimizer.param_groups
        for chosen in [[group] for group in groups] if one_by_one else [groups]:
            optimizer.param_groups = chosen
            optimizer.step()
        optimizer.param_groups = groups
        seen.append({part_of(name) for name in moved(before, snapshot(model, optimizer))})
    assert seen == [optimizer.active, set(), set(), optimizer.active]
    for name, state in snapshot(model, optimizer).items():
        assert all(value.isfinite().all() for value in state.values()), name
        assert state["step"] == (2 if part_of(name) in optimizer.active else 0), name


def test_rates_from_the_table_are_those_set_one_by_one(tiny_sets: Path) -> None:
    bench = Bench(tiny_sets, "xray")
    rates_S = rate_table(3, 1e-2, 0.4)
    models = [bench.model(), bench.model()]
    by_table, by_number = (PartAdamW(parameter_groups(model, TRAINING), TRAINING) for model in models)
    by_table.use_rates(rates_S)
    for step in (2, 0, 1):
        by_table.set_update(step)
        by_number.set_rate(float(rates_S[step]))
        for group in by_table.param_groups:
            assert group["lr"].data_ptr() == rates_S[step].data_ptr(), "a view, not a copy"
        for model, optimizer in zip(models, (by_table, by_number), strict=True):
            optimizer.active = active_parts("image", "pretext")
            backward(bench, model, "pretext")
            optimizer.step()
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_saved_state_holds_the_rate_as_a_number_and_loads(tiny_sets: Path) -> None:
    model = Bench(tiny_sets, "report").model()
    optimizer = PartAdamW(parameter_groups(model, TRAINING), TRAINING)
    optimizer.use_rates(rate_table(1000, 1e-2, 0.1))
    optimizer.set_update(500)
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    state = optimizer.state_dict()
    assert [type(group["lr"]) for group in state["param_groups"]] == [float] * len(optimizer.param_groups)
    assert optimizer.param_groups[0]["lr"] is rate, "saving changes nothing"
    fresh = PartAdamW(parameter_groups(model, TRAINING), TRAINING)
    fresh.load_state_dict(state)
    assert {group["lr"] for group in fresh.param_groups} == {float(rate)}
    fresh.use_rates(rate_table(1000, 1e-2, 0.1))
    fresh.set_update(500)
    assert all(torch.equal(group["lr"], rate) for group in fresh.param_groups)


@pytest.mark.parametrize("step", [-1, 3])
def test_an_update_without_a_rate_is_refused(step: int) -> None:
    optimizer = PartAdamW([{"params": [torch.nn.Parameter(torch.zeros(2))], "part": "blocks"}], TRAINING)
    with pytest.raises(ValueError, match="the table has 0"):
        optimizer.set_update(0)
    optimizer.use_rates(rate_table(3, 1.0, 0.0))
    with pytest.raises(ValueError, match="the table has 3"):
        optimizer.set_update(step)
    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(())):
        with pytest.raises(ValueError, match="reads float32"):
            optimizer.use_rates(wrong)


@pytest.mark.parametrize(
    ("num_steps", "warmup"), [(1, 0.0), (2, 0.999), (7, 0.0), (1000, 40 / 300), (30_001, 0.05)]
)
def test_the_table_is_the_learning_rate_rounded_once(num_steps: int, warmup: float) -> None:
    table = rate_table(num_steps, 2.4e-3, warmup)
    assert table.dtype == torch.float32 and table.shape == (num_steps,)
    for step in range(num_steps):
        rate = learning_rate(step, num_steps, 2.4e-3, warmup)
        assert abs(float(table[step]) - rate) <= 2**-24 * rate, step
