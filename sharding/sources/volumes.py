"""NIfTI volumes, alone or beside DICOM series."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mnemos.sharding.building.preprocess import volume_samples
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sample import Sample
from mnemos.sharding.sources.nifti_file import read_nifti_file
from mnemos.sharding.sources.source import FindOptions, Outcome, Source
from mnemos.sharding.sources.units import (
    RawVolume,
    Unit,
    files_below,
    patient_axes,
    relative_name,
    root_of,
    suffix,
)

ENDINGS = (".nii", ".nii.gz")
SPACING_MM = (0.01, 50.0)  # a voxel outside this range is a header's mistake
MOST_MM = 3000.0  # a volume longer than this, too
MOST_GROWTH = 200  # times as many voxels after resampling; voxels of 5 mm become 125 of 1 mm
FREE_VOXELS = 64 << 20  # up to here any growth is believed
_TOWARDS = {
    "L": (0, 1),
    "R": (0, -1),
    "P": (1, 1),
    "A": (1, -1),
    "S": (2, 1),
    "I": (2, -1),
}  # axis and sign in LPS


def find_nifti(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every NIfTI file."""
    axes = check_axes(options.axes)
    return [
        Unit(name=relative_name(path, root_of(source)), reader="nifti", files=(path,), axes=axes)
        for path in files_below(source)
        if suffix(path) in ENDINGS
    ]


def read_nifti(path: Path, axes: str = "") -> RawVolume:
    """Read a NIfTI file: header's slope and intercept applied, axes in patient order.

    Args:
        path: .nii or .nii.gz.
        axes: where the three voxel axes run, such as "LPS" (towards left, back, head); "": as the header
            says.

    Raises:
        DataError: as ``read_nifti_file``; impossible spacing, or no finite value.
    """
    values, affine, unit_mm = read_nifti_file(path)
    affine_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # NIfTI counts towards the right and the front
    affine_lps[:3] *= unit_mm
    if axes:
        affine_lps = axes_affine(axes, np.sqrt((affine_lps[:3, :3] ** 2).sum(axis=0)))
    # A scanner's first voxel never lies at its centre: such a header was made up by a program that knew no
    # position, and then as a rule no direction either.
    made_up = not axes and not affine[:3, 3].any() and not (affine - np.diag(np.diag(affine))).any()
    return replace(oriented(values, affine_lps), doubtful=made_up)


def check_axes(axes: str) -> str:
    """Return three letters that name each axis once, in capitals; UserError for anything else."""
    letters = axes.upper()
    if letters and sorted(_TOWARDS.get(letter, (9, 0))[0] for letter in letters) != [0, 1, 2]:
        raise UserError(
            f"--axes is {axes!r}; three letters are allowed that say where the voxel axes run, "
            "one of L and R, one of A and P, one of S and I, such as LPS"
        )
    return letters


def axes_affine(axes: str, spacing: np.ndarray) -> np.ndarray:
    """Return the affine [4, 4] towards left, back and head of voxel axes named by three letters."""
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = 0
    for column, letter in enumerate(axes):
        row, sign = _TOWARDS[letter]
        affine_lps[row, column] = sign * spacing[column]
    return affine_lps


def oriented(values: np.ndarray, affine_lps: np.ndarray) -> RawVolume:
    """Bring a volume into patient order and check that its numbers make sense.

    Args:
        values: float32, three axes; changed in place, because there may not be room for two of them.
        affine_lps: [4, 4] from voxel indices to millimetres towards left, back and head.
    """
    from nibabel.orientations import io_orientation

    spacing = np.sqrt((affine_lps[:3, :3] ** 2).sum(axis=0))
    if not (
        np.isfinite(affine_lps).all() and ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all()
    ):
        sizes = " x ".join(f"{mm:g}" for mm in spacing)
        raise DataError(
            f"its voxels are said to be {sizes} mm; between {SPACING_MM[0]} and {SPACING_MM[1]} is allowed"
        )
    if max(values.shape * spacing) > MOST_MM:
        raise DataError(
            f"it would be {max(values.shape * spacing) / 1000:g} m long: its voxel sizes are wrong"
        )
    if np.isnan(io_orientation(affine_lps)).any():
        raise DataError("its axes lie in one plane and span no volume")
    finite = np.isfinite(values)
    if not finite.any():
        raise DataError("none of its values is a finite number")
    if not finite.all():  # often how "outside the patient" is written
        np.copyto(values, values.min(where=finite, initial=np.inf), where=~finite)
    values_ZYX = patient_axes(values, affine_lps)
    axis_mm = patient_axes_spacing(spacing, affine_lps)
    return RawVolume(values_ZYX=values_ZYX.astype(np.float32, copy=False), spacing_mm=axis_mm)


def patient_axes_spacing(spacing: np.ndarray, affine_lps: np.ndarray) -> tuple[float, float, float]:
    """Return (Z, Y, X) spacing of a volume after ``patient_axes``, from that of its axes before."""
    from nibabel.orientations import io_orientation

    x, y, z = (float(spacing[list(io_orientation(affine_lps)[:, 0]).index(axis)]) for axis in range(3))
    return z, y, x


def _check_growth(raw: RawVolume, size: StoredSize) -> None:
    """Refuse voxels so coarse that a small file would be resampled to gigabytes."""
    growth = float(np.prod(raw.spacing_mm) / np.prod(size.spacing_mm))
    if growth > MOST_GROWTH and raw.values_ZYX.size * growth > FREE_VOXELS:
        sizes = " x ".join(f"{mm:g}" for mm in raw.spacing_mm)
        raise DataError(
            f"its voxels are said to be {sizes} mm: resampled it would be {growth:.0f} times as large"
        )


def volume_outcome(unit: Unit, raw: RawVolume, modality: Modality, size: StoredSize) -> Outcome:
    """Cut a volume into the preset's sub-volumes, the samples of its unit; raises as ``volume_samples``."""
    _check_growth(raw, size)
    parts, dropped = volume_samples(raw, modality, size, unit.facts.get("centre", "volume"))
    samples = (
        Sample(
            array=part.values_ZYX,
            source=f"{unit.name}:{number}",
            group=unit.group or unit.name,
            label=unit.label,
            scale=part.scale,
            shift=part.shift,
        )
        for number, part in enumerate(parts)
    )
    return Outcome(samples=tuple(samples), dropped=dropped, doubtful=raw.doubtful)


def read_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read a unit that is one NIfTI file."""
    return volume_outcome(unit, read_nifti(unit.files[0], unit.axes), modality, size)


SOURCE = Source(
    name="volumes",
    about="NIfTI files in any folders",
    kinds=("volume",),
    find=find_nifti,
    readers={"nifti": read_unit},
)
