"""Patches by slicing, one at a time: what the patch kernels are held against. Written from the definition alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PatchCase:
    """One configuration of the patch kernels; `num_ids` patches of every sample are asked for."""

    image: tuple[int, ...]  # [B, C, Y, X] or [B, C, Z, Y, X]
    patch: tuple[int, ...]
    channels: int
    num_ids: int
    stored: torch.dtype = torch.uint8

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return images, ids, scale, shift, flip, partner and weight, the same at every call."""
        g = torch.Generator().manual_seed(11)
        B, axes = self.image[0], len(self.patch)
        if self.stored.is_floating_point:
            images = torch.randn(self.image, generator=g).to(self.stored)
        else:
            bounds = torch.iinfo(self.stored)
            images = torch.randint(bounds.min, bounds.max + 1, self.image, generator=g).to(self.stored)
        num_patches = 1
        for size, side in zip(self.image[2:], self.patch, strict=True):
            num_patches *= size // side
        made = {
            "images": images,
            "ids": torch.rand(B, num_patches, generator=g).argsort(1)[:, : self.num_ids].sort(1).values,
            "scale": torch.rand(B, generator=g) / 200 + 0.001,
            "shift": torch.randn(B, generator=g) / 4,
            "flip": torch.rand(B, axes, generator=g) < 0.5,
            "partner": torch.randperm(B, generator=g),
            "weight": torch.rand(B, generator=g),
        }
        return {name: values.contiguous().to(device) for name, values in made.items()}


def slice_patches(case: PatchCase, images: Tensor, ids_BK: Tensor, flip_BA: Tensor | None) -> Tensor:
    """Return the stored values [B, K, P] in fp64."""
    out = []
    for image, ids, b in zip(images.double(), ids_BK.tolist(), range(len(images)), strict=True):
        if flip_BA is not None:
            image = image.flip([axis + 1 for axis in range(len(case.patch)) if flip_BA[b, axis]])
        image = torch.cat([image] * (case.channels // image.shape[0]))
        grid = [size // side for size, side in zip(image.shape[1:], case.patch, strict=True)]
        for patch_id in ids:
            corner = []
            for cells in reversed(grid):
                corner.insert(0, patch_id % cells)
                patch_id //= cells
            where = [slice(c * side, (c + 1) * side) for c, side in zip(corner, case.patch, strict=True)]
            out.append(image[:, *where].movedim(0, -1).flatten())
    return torch.stack(out).view(*ids_BK.shape, -1)


CASES = [
    pytest.param(PatchCase(image=(2, 3, 8, 12), patch=(4, 4), channels=3, num_ids=4), id="rgb"),
    pytest.param(
        PatchCase(image=(3, 1, 6, 10), patch=(3, 5), channels=3, num_ids=3), id="grey-to-3-odd-patch"
    ),
    pytest.param(PatchCase(image=(1, 1, 2, 2), patch=(1, 2), channels=1, num_ids=1), id="B1-K1-P2-smallest"),
    pytest.param(PatchCase(image=(1, 3, 16, 32), patch=(16, 16), channels=3, num_ids=2), id="16x16x3-all"),
    pytest.param(
        PatchCase(image=(2, 1, 4, 6, 4), patch=(2, 3, 4), channels=1, num_ids=3, stored=torch.int16),
        id="volume-non-cubic-int16",
    ),
    pytest.param(
        PatchCase(image=(1, 1, 16, 16, 32), patch=(16, 16, 16), channels=1, num_ids=2, stored=torch.int16),
        id="volume-16x16x16-int16",
    ),
    pytest.param(
        PatchCase(image=(2, 2, 2, 4, 3), patch=(1, 2, 3), channels=2, num_ids=2, stored=torch.float32),
        id="volume-2-channels-fp32",
    ),
    pytest.param(
        PatchCase(image=(2, 3, 5, 7), patch=(5, 1), channels=3, num_ids=5, stored=torch.bfloat16),
        id="rgb-bf16-odd",
    ),
]

# What the stages of the preset `base` run; only a GPU gets through them in time.
REAL_CASES = [
    pytest.param(PatchCase(image=(64, 3, 224, 224), patch=(16, 16), channels=3, num_ids=147), id="rgb-224"),
    pytest.param(PatchCase(image=(64, 1, 224, 224), patch=(16, 16), channels=3, num_ids=49), id="grey-224"),
    pytest.param(
        PatchCase(
            image=(32, 1, 16, 192, 192), patch=(16, 16, 16), channels=1, num_ids=108, stored=torch.int16
        ),
        id="volume-16x192x192",
    ),
]
