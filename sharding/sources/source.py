"""What a source is: it lists the units of a folder and reads one of them into stored samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mnemos.sharding.modalities import Kind, Modality, StoredSize
from mnemos.sharding.sample import Sample
from mnemos.sharding.sources.units import Unit


@dataclass(frozen=True, kw_only=True)
class FindOptions:
    """What a user may say about the input; a source uses what concerns it.

    Attributes:
        text_column, label_column, group_column: columns of a table of texts.
        axes: NIfTI: where the voxel axes run, if the headers are wrong.
        centre: what the cut of a volume in plane is centred on, "volume" or "body".
    """

    text_column: str = "text"
    label_column: str = "label"
    group_column: str = "group"
    axes: str = ""
    centre: str = "volume"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one unit.

    Attributes:
        samples: what is stored of it.
        dropped: number of nearly empty sub-volumes.
        doubtful: its orientation may be wrong, because its header looks made up.
        broken: why it, or a part of it, cannot be read; "" where all of it can.
        left_out: why a sound unit gives no sample.
        skipped: number of its parts that were passed over, by reason.
    """

    samples: tuple[Sample, ...] = ()
    dropped: int = 0
    doubtful: bool = False
    broken: str = ""
    left_out: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)


def image_outcome(unit: Unit, image_CYX: np.ndarray) -> Outcome:
    """Wrap a stored picture, uint8 [C, Y, X], as its unit's only sample."""
    sample = Sample(
        array=image_CYX, source=unit.name, group=unit.group or unit.name, label=unit.label, scale=1 / 255
    )
    return Outcome(samples=(sample,))


Reader = Callable[[Unit, Modality, StoredSize], Outcome]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One way files lie in folders.

    Attributes:
        name: as users type it after --source.
        about: half a line for --help: what it reads.
        kinds: of the modalities it can give.
        fits: refines `kinds`, by the modality's record, never by its name.
        find: lists the units of a folder (or a file) that is known to exist and to hold files. A data set raises
            UserError where the folder does not look as it must, saying what was found and what was expected.
        readers: by `Unit.reader`, what reads such a unit: raises DataError for a broken and LeftOut for a sound
            unit that gives nothing; runs in another process, so it is a module-level function. Two sources may
            share a reader under its one name.
        public: texts that were published by their authors: they need no scrubbing.
        steps: what this source does before the steps of every source, a sentence each, for the manifest's recipe.
    """

    name: str
    about: str
    kinds: tuple[Kind, ...]
    find: Callable[[Path, Modality, FindOptions], list[Unit]]
    readers: Mapping[str, Reader] = field(default_factory=dict)
    fits: Callable[[Modality], bool] = lambda modality: True
    public: bool = False
    steps: Mapping[str, str] = field(default_factory=dict)
