"""One training sample on its way into a shard."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a source or a generator yields and the writer stores.

    Attributes:
        array: the stored values. Image: uint8 [C, Y, X], C = 1 (grey) or 3 (RGB). Volume: int16 [Z, Y, X]
            with Z from foot to head, Y from front to back, X from the patient's right to the left (LPS).
            Text: str.
        source: names the sample inside its source (a relative path and a part number); only its keyed hash is
            stored.
        group: samples of one patient (or one original tile) share it; only its keyed hash is stored. Empty:
            source.
        label: class name, or "" where there is none.
        scale, shift: model value = stored value * scale + shift.
    """

    array: np.ndarray | str
    source: str
    group: str = ""
    label: str = ""
    scale: float = 1.0
    shift: float = 0.0
