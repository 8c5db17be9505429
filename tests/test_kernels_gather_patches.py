"""gather_patches: reference and device code against slices taken one at a time."""

from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager
from patch_oracle import CASES, REAL_CASES, PatchCase, slice_patches
from torch import Tensor

from mnemos.kernels.gather_patches import gather_patches, gather_patches_reference, launch_gather_patches

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OPTIONS = pytest.mark.parametrize(
    ("flip", "mix"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["plain", "flip", "mix", "both"],
)


def arguments(
    case: PatchCase, flip: bool, mix: bool, dtype: torch.dtype, device: torch.device | str
) -> tuple[Any, ...]:
    """Return the positional arguments that reference, launch and custom op share."""
    made = case.inputs(device)
    return (
        made["images"],
        made["ids"],
        case.patch,
        case.channels,
        made["scale"],
        made["shift"],
        made["flip"] if flip else None,
        made["partner"] if mix else None,
        made["weight"] if mix else None,
        dtype,
    )


def by_slices(case: PatchCase, args: tuple[Any, ...], at: torch.dtype) -> Tensor:
    """Return the definition, computed in `at`."""
    images, ids, _, _, scale, shift, flip, partner, weight, _ = args
    scale, shift = scale.to(at)[:, None, None], shift.to(at)[:, None, None]
    own = slice_patches(case, images, ids, flip).to(at) * scale + shift
    if partner is None:
        return own
    other = slice_patches(case, images[partner], ids, flip).to(at) * scale[partner] + shift[partner]
    weight = weight.to(at)[:, None, None]
    return weight * own + (1 - weight) * other


@DTYPES
@OPTIONS
@pytest.mark.parametrize("case", CASES)
def test_device_code_and_reference_match_slices(
    case: PatchCase, flip: bool, mix: bool, dtype: torch.dtype, device: torch.device
) -> None:
    args = arguments(case, flip, mix, dtype, device)
    on_host = arguments(case, flip, mix, dtype, "cpu")
    oracle, eager = by_slices(case, on_host, torch.float64), by_slices(case, on_host, torch.float32).to(dtype)
    assert_as_accurate_as_eager("device code", launch_gather_patches(*args).cpu(), eager, oracle)
    assert_as_accurate_as_eager("reference", gather_patches_reference(*on_host), eager, oracle)


def test_public_function_passes_every_option_on() -> None:
    case = PatchCase(image=(3, 1, 8, 8), patch=(4, 4), channels=3, num_ids=2)
    made = case.inputs()
    out = gather_patches(
        made["images"],
        made["ids"],
        patch=case.patch,
        channels=3,
        scale_B=made["scale"],
        shift_B=made["shift"],
        flip_BA=made["flip"],
        partner_B=made["partner"],
        weight_B=made["weight"],
        dtype=torch.bfloat16,
    )
    expected = by_slices(case, arguments(case, True, True, torch.bfloat16, "cpu"), torch.float64)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8)


def test_patches_not_asked_for_do_not_leak(device: torch.device) -> None:
    images = torch.full((1, 1, 4, 8), torch.nan)
    images[..., 4:] = 2.0
    args = (images.to(device), torch.tensor([[1]], device=device), (4, 4), 1)
    ones = torch.ones(1, device=device)
    out = launch_gather_patches(*args, ones, ones, None, None, None, torch.float32)
    assert out.eq(3.0).all()
    assert gather_patches(*args[:2], patch=(4, 4), channels=1, scale_B=ones, shift_B=ones).eq(3.0).all()


def test_a_view_into_a_larger_batch_is_read_at_its_own_place() -> None:
    case = PatchCase(image=(3, 1, 2, 5), patch=(2, 5), channels=1, num_ids=1)
    whole = case.inputs()["images"]
    ids, ones, zeros = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2), torch.zeros(2)
    out = gather_patches(whole[1:], ids, patch=(2, 5), channels=1, scale_B=ones, shift_B=zeros)
    assert out.flatten(1).equal(whole[1:].flatten(1).float())


@pytest.mark.parametrize("mix", [False, True], ids=["plain", "mix"])
def test_registered_as_a_custom_op(mix: bool) -> None:
    case = PatchCase(image=(2, 3, 4, 8), patch=(4, 4), channels=3, num_ids=1)
    torch.library.opcheck(torch.ops.mnemos.gather_patches, arguments(case, True, mix, torch.float32, "cpu"))


MISTAKES = {
    "patch-does-not-divide": ({"patch": (3, 4)}, r"\(2, 1, 4, 8\).*\(3, 4\)"),
    "patch-of-three-sides": ({"patch": (1, 4, 4)}, r"\(z, y, x\)"),
    "two-channels": ({"images": torch.zeros(2, 2, 4, 8), "channels": 3}, r"channels=3"),
    "ids-of-another-batch": ({"ids_BK": torch.zeros(1, 1, dtype=torch.int64)}, r"B = 2"),
    "flip-not-bool": ({"flip_BA": torch.zeros(2, 2)}, r"bool \[2, 2\]"),
    "scale-of-another-batch": ({"scale_B": torch.ones(3)}, r"\[2\]"),
    "partner-alone": ({"partner_B": torch.zeros(2, dtype=torch.int64)}, r"together"),
    "not-contiguous": ({"images": torch.zeros(2, 1, 8, 4).transpose(2, 3)}, r"contiguous"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "images": torch.zeros(2, 1, 4, 8),
        "ids_BK": torch.zeros(2, 1, dtype=torch.int64),
        "patch": (4, 4),
        "channels": 1,
        "scale_B": torch.ones(2),
        "shift_B": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        gather_patches(**(good | change))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("mix", [False, True], ids=["plain", "flip-mix"])
@pytest.mark.parametrize("case", REAL_CASES)
def test_cuda_path_on_real_shapes(case: PatchCase, mix: bool, dtype: torch.dtype) -> None:
    args = arguments(case, mix, mix, dtype, "cuda")
    images, ids, patch, channels, scale, shift, flip, partner, weight, _ = args
    keywords = {"flip_BA": flip, "partner_B": partner, "weight_B": weight, "dtype": dtype}
    ours = gather_patches(
        images, ids, patch=patch, channels=channels, scale_B=scale, shift_B=shift, **keywords
    )
    oracle = gather_patches_reference(*args[:-1], torch.float64)
    assert_as_accurate_as_eager("cuda", ours, gather_patches_reference(*args), oracle)
    torch.library.opcheck(torch.ops.mnemos.gather_patches, args)
