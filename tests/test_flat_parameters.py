"""Flat parameters: the same numbers and names as without, in few tensors."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mnemos.engine.flat_parameters import ALIGNMENT, flatten_parameters, unflatten


class Unit(nn.Module):
    """Two layers, one of them used twice, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.full((5,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.norm(self.first(x)).relu())
        return x + self.scale * self.last(hidden)


class Model(nn.Module):
    """Two units, a layer and a parameter outside of any, and a unit that may stay idle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units = nn.ModuleList([Unit(), Unit()])
        self.idle = Unit()
        self.head = nn.Linear(5, 3)
        self.bias = nn.Parameter(torch.randn(3))
        self.never = nn.ParameterDict({"kept": torch.ones(4)})

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        for unit in self.units:
            x = checkpoint(unit, x, use_reentrant=False) if recompute else unit(x)
        out: Tensor = self.head(x) + self.bias
        return out


def part_of(name: str) -> str:
    return name.split(".")[0]


def flattened(model: nn.Module, compute: torch.dtype = torch.float32) -> nn.Module:
    flat = copy.deepcopy(model)
    flatten_parameters(flat, (Unit,), part_of, compute=compute)
    return flat


def inputs() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    given = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }
    return unflatten(model, given)


@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_the_same_bits(recompute: bool) -> None:
    plain = Model()
    flat = flattened(plain)
    out = [model(inputs(), recompute=recompute) for model in (plain, flat)]
    assert torch.equal(*out)
    for one in out:
        one.square().sum().backward()
    expected, found = named_gradients(plain), named_gradients(flat)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


def test_a_unit_is_two_tensors_and_matrices_are_told_apart_by_their_axes() -> None:
    flat = flattened(Model())
    axes = {name: value.ndim for name, value in flat.named_parameters()}
    units = ("units.0", "units.1", "idle", "head")
    assert axes == {
        **{f"{unit}.flat_matrices": 2 for unit in units},
        **{f"{unit}.flat_vectors": 1 for unit in units},
        "flat_vectors": 1,
        "never.kept": 1,
    }
    parts = {name: getattr(value, "part", None) for name, value in flat.named_parameters()}
    assert parts["units.1.flat_matrices"] == "units" and parts["flat_vectors"] == "bias"
    assert parts["never.kept"] is None


def test_parameters_of_different_parts_stay_apart() -> None:
    flat = copy.deepcopy(Model())
    flatten_parameters(flat, (Unit,), lambda name: "norms" if "norm" in name else part_of(name))
    parts = {name: getattr(value, "part", None) for name, value in flat.named_parameters()}
    assert parts["idle.flat_vectors_norms"] == "norms" and parts["idle.flat_vectors_idle"] == "idle"
    assert flat.state_dict().keys() == Model().state_dict().keys()


def test_state_dicts_keep_names_and_shapes_both_ways() -> None:
    plain = Model()
    flat, other = flattened(plain), flattened(Model())
    state = flat.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    changed = {name: value + 1 for name, value in state.items()}
    other.load_state_dict(changed)
    plain.load_state_dict(changed)
    assert torch.equal(other(inputs()), plain(inputs()))
    with pytest.raises(RuntimeError, match=r"Missing key.*units\.1\.flat_vectors"):
        other.load_state_dict({name: value for name, value in changed.items() if name != "units.1.last.bias"})


def test_weights_begin_at_aligned_places_and_what_lies_between_stays_zero() -> None:
    flat = flattened(Model())
    flat(inputs()).sum().backward()
    for unit in (flat.units[0], flat.head):  # type: ignore[index]
        for one in unit.flat_parameters:
            parameter = unit._parameters[one.attribute]
            views = one.views(parameter.detach())
            assert [view.storage_offset() % ALIGNMENT for view in views] == [0] * len(views)
            between = torch.ones_like(parameter, dtype=torch.bool)
            for view in one.views(between):
                view.fill_(False)
            assert (
                between.any() and not parameter.detach()[between].any() and not parameter.grad[between].any()
            )


def test_another_compute_type_rounds_weights_and_gathers_gradients_in_that_of_the_masters() -> None:
    plain = Model()
    low, flat = copy.deepcopy(plain).bfloat16(), flattened(plain, torch.bfloat16)
    x = inputs().bfloat16()
    assert torch.equal(low(x), flat(x))
    for model in (low, flat):
        model(x).float().square().sum().backward()
    for name, gradient in named_gradients(flat).items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, named_gradients(low)[name].float()), name


def test_the_copy_in_the_compute_type_follows_its_master() -> None:
    flat = flattened(Model(), torch.bfloat16)
    optimizer = torch.optim.AdamW(flat.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        flat(inputs().bfloat16()).float().square().sum().backward()
        optimizer.step()
        fresh = Model().bfloat16()
        fresh.load_state_dict({name: value.bfloat16() for name, value in flat.state_dict().items()})
        assert torch.equal(flat(inputs().bfloat16()), fresh(inputs().bfloat16()))
    with torch.no_grad():  # memory that moves, as when DeepSpeed joins parameters
        for parameter in flat.parameters():
            parameter.data = parameter.data.clone().zero_()
    assert not flat(inputs().bfloat16()).any()


def test_a_unit_without_a_part_in_the_loss_gets_no_gradient() -> None:
    flat = flattened(Model())
    flat(inputs()).sum().backward()
    idle = {name for name, value in flat.named_parameters() if value.grad is None}
    assert idle == {"idle.flat_matrices", "idle.flat_vectors", "never.kept"}


def test_weights_are_there_in_forward_only_and_come_back_after_an_error() -> None:
    flat = flattened(Model())
    for x in (inputs(), torch.randn(4, 6)):
        try:
            flat(x)
        except RuntimeError as error:
            assert x.shape[1] == 6, error
        assert flat.units[0].first.weight is None and "Linear(in_features=5" in repr(flat)  # type: ignore[index,union-attr]
    assert flat(inputs()).isfinite().all()
