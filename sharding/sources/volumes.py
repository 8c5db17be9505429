"""NIfTI volumes, alone or beside DICOM series."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.sources.units import MAX_VOXELS, RawVolume, Unit, patient_axes, relative_name, suffix

ENDINGS = (".nii", ".nii.gz")
SPACING_MM = (0.01, 50.0)  # a voxel outside this range is a header's mistake
_TOWARDS = {
    "L": (0, 1),
    "R": (0, -1),
    "P": (1, 1),
    "A": (1, -1),
    "S": (2, 1),
    "I": (2, -1),
}  # axis and sign in LPS
_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}


def find_nifti(files: list[Path], root: Path, axes: str) -> list[Unit]:
    """Return one unit for every NIfTI file; ``axes`` as in ``read_nifti``."""
    return [
        Unit(name=relative_name(path, root), reader="nifti", files=(path,), axes=axes)
        for path in files
        if suffix(path) in ENDINGS
    ]


def read_nifti(path: Path, axes: str = "") -> RawVolume:
    """Read a NIfTI file: header's slope and intercept applied, axes in patient order.

    Args:
        path: .nii or .nii.gz.
        axes: where the three voxel axes run, such as "LPS" (towards left, back, head); "": as the header
            says.

    Raises:
        DataError: unreadable, not of three dimensions (one further of size 1 is allowed), more than 2 GiB as
            float32, impossible spacing, or no finite value.
    """
    import nibabel

    try:
        image = nibabel.nifti1.load(path)
    except Exception as error:  # nibabel raises its own classes and those of gzip, zlib and struct
        raise DataError(f"it is not a readable NIfTI file ({error})") from error
    shape = tuple(int(size) for size in image.shape)
    if len(shape) < 3:
        raise DataError(f"it has {len(shape)} dimensions ({'x'.join(map(str, shape))}); a volume needs three")
    if any(size != 1 for size in shape[3:]):
        raise DataError(
            f"it holds {int(np.prod(shape[3:]))} frames ({'x'.join(map(str, shape))}); store one per file"
        )
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise DataError(
            f"its header declares {'x'.join(map(str, shape))} voxels, more than 2 GiB; cut it into parts"
        )
    if image.get_data_dtype().fields is not None or np.issubdtype(image.get_data_dtype(), np.complexfloating):
        raise DataError("its voxels are colours or complex numbers; one real value a voxel is needed")
    unit = _MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    try:
        values = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape[:3])
    except Exception as error:  # a truncated file raises as the decompressor likes
        raise DataError(f"its voxels cannot be read ({error})") from error
    affine_lps = (
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    )  # NIfTI counts towards the right and the front
    affine_lps[:3] *= unit
    if axes:
        affine_lps = axes_affine(axes, np.sqrt((affine_lps[:3, :3] ** 2).sum(axis=0)))
    # A scanner's first voxel never lies at its centre: such a header was made up by a program that knew no
    # position, and then as a rule no direction either.
    made_up = (
        not axes
        and not image.affine[:3, 3].any()
        and not (image.affine - np.diag(np.diag(image.affine))).any()
    )
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
        values: float32, three axes.
        affine_lps: [4, 4] from voxel indices to millimetres towards left, back and head.
    """
    spacing = np.sqrt((affine_lps[:3, :3] ** 2).sum(axis=0))
    if not (
        np.isfinite(affine_lps).all() and ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all()
    ):
        sizes = " x ".join(f"{mm:g}" for mm in spacing)
        raise DataError(
            f"its voxels are said to be {sizes} mm; between {SPACING_MM[0]} and {SPACING_MM[1]} is allowed"
        )
    finite = np.isfinite(values)
    if not finite.any():
        raise DataError("none of its values is a finite number")
    if not finite.all():  # often how "outside the patient" is written
        values = np.where(finite, values, values[finite].min())
    values_ZYX = patient_axes(values, affine_lps)
    axis_mm = patient_axes_spacing(spacing, affine_lps)
    return RawVolume(values_ZYX=values_ZYX.astype(np.float32, copy=False), spacing_mm=axis_mm)


def patient_axes_spacing(spacing: np.ndarray, affine_lps: np.ndarray) -> tuple[float, float, float]:
    """Return (Z, Y, X) spacing of a volume after ``patient_axes``, from that of its axes before."""
    from nibabel.orientations import io_orientation

    x, y, z = (float(spacing[list(io_orientation(affine_lps)[:, 0]).index(axis)]) for axis in range(3))
    return z, y, x
