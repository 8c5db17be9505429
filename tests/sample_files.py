"""Small medical files of every format, written by the tests themselves."""

import csv
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

KEY = b"a key for tests, sixteen bytes or more"
AXIAL = (1, 0, 0, 0, 1, 0)


def key_file(folder: Path) -> str:
    """Write the tests' key and return its path."""
    file = folder / "key"
    file.write_bytes(KEY)
    return str(file)


def grey_film(seed: int, size: tuple[int, int] = (96, 80)) -> np.ndarray:
    """Return a smooth uint8 picture [Y, X] that survives JPEG."""
    y, x = np.mgrid[: size[0], : size[1]]
    random = np.random.default_rng(seed)
    a, b, phase = random.uniform(1, 3, 3)
    wave = np.sin(a * x / size[1] * np.pi + phase) * np.cos(b * y / size[0] * np.pi)
    return np.round(127 + 100 * wave).astype(np.uint8)


def write_films(folder: Path, num: int, *, groups: int | None = None) -> Path:
    """Write ``num`` grey JPEGs and a labels.csv with two classes and ``groups`` patients."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(num):
        name = f"film_{number:03d}.jpg"
        Image.fromarray(grey_film(number)).save(folder / name, quality=95)
        rows.append((name, ("healthy", "ill")[number % 2], f"patient_{number % (groups or num)}"))
    write_csv(folder / "labels.csv", ["file", "label", "group"], rows)
    return folder


def write_csv(path: Path, columns: list[str], rows: list[tuple[str, ...]]) -> Path:
    """Write a CSV table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_nifti(path: Path, values_XYZ: np.ndarray, affine: np.ndarray) -> Path:
    """Write a NIfTI file; the affine counts millimetres towards right, front and head."""
    nibabel.Nifti1Image(values_XYZ, affine).to_filename(path)
    return path


def head(seed: int = 0, shape_ZYX: tuple[int, int, int] = (24, 40, 40)) -> np.ndarray:
    """Return a CT-like head [Z, Y, X] in Hounsfield units: skull, brain, air around."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape_ZYX), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes[1:]))
    values = np.where(radius < 0.8, 40, -1000)
    values[(radius > 0.7) & (radius < 0.8)] = 900
    noise = np.random.default_rng(seed).normal(0, 10, shape_ZYX)
    return np.round(values + noise).astype(np.int16)


def write_dicom(
    path: Path,
    pixels: np.ndarray,
    *,
    syntax: str = ExplicitVRLittleEndian,
    dicom_type: str = "MR",
    photometric: str = "MONOCHROME2",
    **fields: object,
) -> Path:
    """Write one DICOM file of uint8/uint16/int16 [Y, X] pixels, compressed where the syntax says so."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    native = syntax == ExplicitVRLittleEndian or syntax == pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.file_meta.TransferSyntaxUID = syntax if native else ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.Modality = dicom_type
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    for name, value in fields.items():
        setattr(dataset, name, value)
    if not native:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    slices: np.ndarray,
    *,
    orientation: tuple[float, ...] = AXIAL,
    spacing_mm: tuple[float, float, float] = (5.0, 2.0, 1.0),
    shuffle: bool = True,
    **fields: object,
) -> list[Path]:
    """Write [slice, row, column] pixels as a series, files in an order of their own.

    Args:
        spacing_mm: (slice, row, column) millimetres.
    """
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    series, frame = generate_uid(), generate_uid()
    order = np.random.default_rng(0).permutation(len(slices)) if shuffle else np.arange(len(slices))
    return [
        write_dicom(
            folder / f"{file:03d}.dcm",
            slices[place],
            **{
                "SeriesInstanceUID": series,
                "FrameOfReferenceUID": frame,
                "PatientID": "patient-7",
                "ImageOrientationPatient": list(orientation),
                "ImagePositionPatient": [float(v) for v in normal * spacing_mm[0] * place],
                "PixelSpacing": list(spacing_mm[1:]),
                **fields,
            },
        )
        for file, place in enumerate(order)
    ]
