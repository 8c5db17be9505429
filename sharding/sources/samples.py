"""From an input folder to units, and from units to stored samples: all sources behind one door."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mnemos.sharding.errors import DataError, LeftOut, UserError
from mnemos.sharding.modalities import DICOM_TYPES, Modality, StoredSize
from mnemos.sharding.preprocess import volume_samples
from mnemos.sharding.sample import Sample
from mnemos.sharding.sources import dicom, images, texts, volumes
from mnemos.sharding.sources.units import Unit, describe_files, files_below

_WANTED = {
    "text": "CSV or JSONL tables",
    "image": "JPEG, PNG or DICOM pictures",
    "volume": "NIfTI files or DICOM series",
}
_CHUNKS = {"image": 16, "volume": 1}  # units a worker takes at a time: a picture is small, a volume is not
_ALONE = 64  # fewer pictures than this are read before a second process has started


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one unit.

    Attributes:
        samples: what is stored of it.
        dropped: number of nearly empty sub-volumes.
        doubtful: its orientation may be wrong, because its header looks made up.
        broken: why it cannot be read; "" where it can.
        left_out: why a sound unit gives no sample.
    """

    samples: tuple[Sample, ...] = ()
    dropped: int = 0
    doubtful: bool = False
    broken: str = ""
    left_out: str = ""


def find_units(
    source: Path, modality: Modality, *, text_column: str, label_column: str, group_column: str, axes: str
) -> list[Unit]:
    """List what a folder (or a single file) holds for a modality, in name order.

    Raises:
        UserError: the input is missing, empty, or holds only files of another kind.
    """
    wanted = _WANTED[modality.kind]
    if not source.exists():
        raise UserError(f"input {source} does not exist; give a folder with {wanted}")
    files, root = files_below(source), source if source.is_dir() else source.parent
    if not files:
        raise UserError(f"input folder {source} is empty; {modality.name} is built from {wanted}")
    if modality.kind == "text":
        columns = {"text_column": text_column, "label_column": label_column, "group_column": group_column}
        units = texts.find_texts(files, root, **columns)
    elif modality.kind == "image":
        units = images.find_images(files, root) + dicom.find_pictures(files, root)
    else:
        units = volumes.find_nifti(files, root, volumes.check_axes(axes)) + dicom.find_series(files, root)
    if not units:
        raise UserError(
            f"input {source} holds {describe_files(files)} but {modality.name} is built from {wanted}; "
            "check the modality and the folder"
        )
    return sorted(units, key=lambda unit: unit.name)


def read_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read one unit and bring it to its stored form; never raises for what the unit holds."""
    if unit.broken:
        return Outcome(broken=unit.broken)
    try:
        return _read(unit, modality, size)
    except LeftOut as reason:
        return Outcome(left_out=str(reason))
    except DataError as error:
        return Outcome(broken=error.reason)
    except OSError as error:
        return Outcome(broken=f"it cannot be read ({error.strerror or error})")
    except (
        ValueError,
        MemoryError,
        OverflowError,
        ArithmeticError,
    ) as error:  # a header's nonsense that got this far
        return Outcome(broken=f"it cannot be used ({type(error).__name__}: {error})")


def read_units(units: list[Unit], modality: Modality, size: StoredSize, workers: int) -> Iterator[Outcome]:
    """Read units, in several processes where that pays, and yield the outcomes in the units' order."""
    chunk = _CHUNKS.get(modality.kind, len(units))
    if workers <= 1 or len(units) <= chunk or (chunk > 1 and len(units) < _ALONE):
        yield from (read_unit(unit, modality, size) for unit in units)
        return
    chunks = deque(units[start : start + chunk] for start in range(0, len(units), chunk))
    # Spawned, not forked: a fork copies locks that library threads may hold.
    context, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore) as pool:
        waiting: deque[Future[list[Outcome]]] = deque()
        try:
            while chunks or waiting:
                while (
                    chunks and len(waiting) < 3 * workers
                ):  # enough to keep all busy, few enough to fit in memory
                    waiting.append(pool.submit(_read_chunk, chunks.popleft(), modality, size))
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read_chunk(units: list[Unit], modality: Modality, size: StoredSize) -> list[Outcome]:
    return [read_unit(unit, modality, size) for unit in units]


def _read(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    types, group = DICOM_TYPES.get(modality.name, ()), unit.group or unit.name
    path = unit.files[0]
    if unit.reader == "text":
        if not unit.text:
            raise LeftOut("empty text")
        return Outcome(samples=(Sample(array=unit.text, source=unit.name, group=group, label=unit.label),))
    if unit.reader in ("image", "dicom_image"):
        if unit.reader == "image":
            array = images.read_image(path, modality.channels, size.image)
        else:
            array = dicom.read_picture(path, types, modality.channels, size.image)
        sample = Sample(array=array, source=unit.name, group=group, label=unit.label, scale=1 / 255)
        return Outcome(samples=(sample,))
    if unit.reader == "nifti":
        raw = volumes.read_nifti(path, unit.axes)
    else:
        raw = dicom.read_series(unit.files, types, invert=modality.values != "hounsfield")
    parts, dropped = volume_samples(raw, modality, size)
    samples = (
        Sample(
            array=part.values_ZYX,
            source=f"{unit.name}:{number}",
            group=group,
            label=unit.label,
            scale=part.scale,
            shift=part.shift,
        )
        for number, part in enumerate(parts)
    )
    return Outcome(samples=tuple(samples), dropped=dropped, doubtful=raw.doubtful)
