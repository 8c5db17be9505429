"""Parameters of a module as one or two flat tensors, so that what costs by tensor costs little.

DeepSpeed's host time grows with the number of parameter tensors: a ViT-B has 300 of them, and its step on a GPU takes less
time than DeepSpeed needs to walk through them. Here each unit of the model (a block, a tokenizer, a head) keeps its matrices
in one flat tensor and its vectors in another: weight decay tells them apart. Inside the unit's forward its layers find
their weights as views, under the names they always had; state dicts keep those names too.

With another compute type the flat tensor is the fp32 master: the views are of a copy in that type, made in every forward,
and gradients become fp32 where they are gathered.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ALIGNMENT = 64  # values; every weight begins at a bound that matrix products and vector loads like


@dataclass(frozen=True)
class _Piece:
    """One parameter's place in a flat tensor."""

    owner: nn.Module
    attribute: str
    name: str  # below the unit
    shape: torch.Size
    room: int  # values it takes up, what fills it up to the next bound included


@dataclass(eq=False)
class FlatParameter:
    """A flat tensor and its pieces.

    Attributes:
        attribute: of the unit, which holds the tensor as a parameter: matrices [1, N], vectors [N].
        pieces: in the order they lie in.
        compute: type of the views.
    """

    attribute: str
    pieces: list[_Piece]
    compute: torch.dtype

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return every piece of a flat tensor, in its shape."""
        parts = flat.view(-1).split_with_sizes([piece.room for piece in self.pieces])
        return [
            part[: piece.shape.numel()].view(piece.shape)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]

    def gather(self, like: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
        """Return the flat gradient of the pieces' gradients; None counts as zeros."""
        if all(grad is not None for grad in grads) and not self._padded:
            flat = torch.empty_like(like)
        else:
            flat = torch.zeros_like(like)
        given = [(view, grad) for view, grad in zip(self.views(flat), grads, strict=True) if grad is not None]
        if given:
            torch._foreach_copy_([view for view, _ in given], [grad for _, grad in given])
        return flat

    @property
    def _padded(self) -> bool:
        return any(piece.room != piece.shape.numel() for piece in self.pieces)


class _Unflatten(torch.autograd.Function):
    """A flat tensor to its pieces; their gradients to one flat gradient."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, parameter: FlatParameter) -> tuple[Tensor, ...]:
        ctx.parameter, ctx.like = parameter, flat
        ctx.set_materialize_grads(False)
        # A copy each time: torch's fused optimisers change a tensor without raising its version.
        return tuple(parameter.views(flat.detach().to(parameter.compute)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        return ctx.parameter.gather(ctx.like, grads), None


def flatten_parameters(
    model: nn.Module,
    units: tuple[type[nn.Module], ...],
    part_of: Callable[[str], str],
    *,
    compute: torch.dtype = torch.float32,
) -> None:
    """Replace the parameters of a model by flat ones, in place; its state dict stays as it was.

    Args:
        model: whose parameters are all of one type.
        units: classes whose instances are flattened with everything below them. Of other modules that compute something
            only their own parameters are, one by one.
        part_of: the part of the model that a parameter belongs to, by name; kept as `part` of the flat parameter.
        compute: type that forward computes in; another than the parameters' own makes those the masters.
    """
    for path, unit in list(_units(model, units)):
        below = unit.named_modules() if isinstance(unit, units) else [("", unit)]
        groups: dict[tuple[str, bool], list[tuple[nn.Module, str, str, nn.Parameter]]] = {}
        for owner_path, owner in below:
            for attribute, parameter in owner._parameters.items():
                if parameter is not None:
                    name = f"{owner_path}.{attribute}" if owner_path else attribute
                    full = f"{path}.{name}" if path else name
                    key = (part_of(full), parameter.ndim > 1)
                    groups.setdefault(key, []).append((owner, attribute, name, parameter))
        flats = []
        for (part, is_matrix), members in groups.items():
            kind = "matrices" if is_matrix else "vectors"
            of_part = "" if len({one for one, _ in groups}) == 1 else "_" + part.replace(".", "_")
            flats.append(_flatten(unit, f"flat_{kind}{of_part}", part, members, compute))
        if flats:
            _serve(unit, flats)


def _units(model: nn.Module, units: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module: units, and modules outside of them that compute something."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, units):
            inside = (*inside, f"{path}.")
            yield path, module
        elif not isinstance(module, nn.ParameterDict | nn.ParameterList):
            yield path, module


def _flatten(
    unit: nn.Module,
    attribute: str,
    part: str,
    members: Sequence[tuple[nn.Module, str, str, nn.Parameter]],
    compute: torch.dtype,
) -> FlatParameter:
    """Make one flat parameter of some of a unit's parameters and give it to the unit."""
    pieces = [
        _Piece(owner, own, name, value.shape, -(-value.numel() // ALIGNMENT) * ALIGNMENT)
        for owner, own, name, value in members
    ]
    flat_parameter = FlatParameter(attribute, pieces, compute)
    first = members[0][3]
    flat = first.detach().new_zeros(sum(piece.room for piece in pieces))
    for view, (owner, own, _, value) in zip(flat_parameter.views(flat), members, strict=True):
        view.copy_(value.detach())
        owner._parameters[own] = None  # stays a name: repr and the like ask for it
    parameter = nn.Parameter(flat[None] if first.ndim > 1 else flat)
    parameter.part = part  # type: ignore[attr-defined]
    unit.register_parameter(attribute, parameter)
    return flat_parameter


def _serve(unit: nn.Module, flats: list[FlatParameter]) -> None:
    """Let a unit's forward find its weights, and its state dict name them."""
    forward = unit.forward
    unit.flat_parameters = flats  # type: ignore[assignment]

    def serving(*args: Any, **kwargs: Any) -> Any:
        # Not by hooks: those of ZeRO 3, which fetch the flat tensor, are registered later and would run later.
        for flat in flats:
            parameter = unit._parameters[flat.attribute]
            assert parameter is not None
            views = _Unflatten.apply(parameter, flat)  # type: ignore[no-untyped-call]
            for piece, view in zip(flat.pieces, views, strict=True):
                piece.owner.__dict__[piece.attribute] = view
        try:
            return forward(*args, **kwargs)
        finally:
            for flat in flats:
                for piece in flat.pieces:
                    del piece.owner.__dict__[piece.attribute]

    unit.forward = serving  # type: ignore[method-assign]
    unit._register_state_dict_hook(_name_pieces)  # type: ignore[no-untyped-call]
    unit._register_load_state_dict_pre_hook(_take_pieces, with_module=True)  # type: ignore[no-untyped-call]


def _name_pieces(unit: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for flat in _flats(unit):
        value = state[prefix + flat.attribute]
        if not _partitioned(unit, flat):
            del state[prefix + flat.attribute]
            state |= {
                prefix + piece.name: view for piece, view in zip(flat.pieces, flat.views(value), strict=True)
            }


def _take_pieces(unit: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for flat in _flats(unit):
        names = [prefix + piece.name for piece in flat.pieces]
        if all(name in state for name in names) and not _partitioned(unit, flat):
            parameter = unit._parameters[flat.attribute]
            assert parameter is not None
            value = torch.zeros_like(parameter)
            for name, view in zip(names, flat.views(value), strict=True):
                view.copy_(state.pop(name))
            state[prefix + flat.attribute] = value


def _flats(unit: nn.Module) -> list[FlatParameter]:
    flats: list[FlatParameter] = unit.__dict__["flat_parameters"]
    return flats


def _partitioned(unit: nn.Module, flat: FlatParameter) -> bool:
    """Tell whether ZeRO 3 has taken the tensor apart: then nobody holds its values."""
    return hasattr(unit._parameters[flat.attribute], "ds_id")


def unflatten(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a flattened model under the names from before.

    Args:
        model: given to `flatten_parameters`.
        values: of all its parameters, by their present names.
    """
    found = dict(values)
    for path, unit in model.named_modules():
        prefix = f"{path}." if path else ""
        for flat in unit.__dict__.get("flat_parameters", ()):
            views = flat.views(found.pop(prefix + flat.attribute))
            found |= {prefix + piece.name: view for piece, view in zip(flat.pieces, views, strict=True)}
    return found
