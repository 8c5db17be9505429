"""What bench/loader.py measures: rates of a core, the decoders alone, growth of memory; and what it refuses to believe.

A rate is samples by seconds of CPU of this process and its workers: what one core gives, whoever else uses it, too.
"""

import multiprocessing
import os
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import blosc2
import numpy as np
import psutil
import simplejpeg
import torch

from mnemos.bench.loader_data import Data
from mnemos.bench.loader_peers import Loader, ours

LEVELS = {"image": 3, "volume": 0}  # how far a decoder's values may lie from another's
STRAW = 0.25  # how far the authors' way may lie from its known rate


class Refused(Exception):
    """Why something is not timed, or its time not believed."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One decoder alone: microseconds an item at the machine of the known rates; what it decodes, and how."""

    name: str
    us: float
    items: Callable[[Data], list[bytes]]
    decode: Callable[[bytes], object]


def _deflated(data: Data) -> list[bytes]:
    return [zlib.compress(volume_CZYX.tobytes()) for volume_CZYX in data.truth_NCYX]


def _shuffled(data: Data) -> list[bytes]:
    # as it was measured there, however our shards store volumes
    kind: dict[str, Any] = {"clevel": 5, "filter": blosc2.Filter.SHUFFLE, "codec": blosc2.Codec.LZ4}
    return [blosc2.compress(volume_CZYX.tobytes(), typesize=2, **kind) for volume_CZYX in data.truth_NCYX]


_GREY, _RGB, _BLOSC2, _ZLIB = (
    Calibration(
        name="simplejpeg",
        us=62.0,
        items=lambda data: data.payloads(128),
        decode=lambda payload: simplejpeg.decode_jpeg(payload, colorspace="GRAY"),
    ),
    Calibration(
        name="simplejpeg",
        us=122.0,
        items=lambda data: data.payloads(128),
        decode=lambda payload: simplejpeg.decode_jpeg(payload, colorspace="RGB"),
    ),
    Calibration(name="blosc2", us=188.0, items=_shuffled, decode=blosc2.decompress),
    Calibration(name="zlib", us=2309.0, items=_deflated, decode=zlib.decompress),
)
DECODERS = {"grey": _GREY, "rgb": _RGB, "volume": _BLOSC2}  # what ours and webdataset spend their time in
AUTHORS_DECODERS = {"grey": _GREY, "volume": _ZLIB}
KNOWN = {"grey": 1494.0, "volume": 246.0}  # samples/s a core of the authors' way, at that machine


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One window: samples by second of CPU, and of the clock."""

    per_cpu_s: float
    per_s: float


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process and its children on one core: the last one, as the first serves most interrupts."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    if find_spec("cv2") is not None:  # of a peer; whoever times that one has asked for it before
        import cv2

        cv2.setNumThreads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="This DataLoader will create"
            )  # two workers on it: so asked
            yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def check(loader: Loader, data: Data) -> None:
    """Compare the first batch in stored order, without augmentation, with the expected one.

    Raises:
        Refused: it is another one.
    """
    batches = loader.open(data, True)
    found = loader.stored(next(batches)).astype(np.float64)
    close(batches)
    wanted = data.truth_NCYX
    fits = found.shape[:1] + found.shape[2:] == wanted.shape[:1] + wanted.shape[2:]
    if not fits or found.shape[1] not in (wanted.shape[1], 3):  # grey may come three times
        raise Refused(f"{loader.name}: a batch of {found.shape}, not {wanted.shape}")
    most, allowed = np.abs(found - wanted).max(), LEVELS[data.sort.modality.kind]
    if not most <= allowed:  # also for NaN
        raise Refused(
            f"{loader.name}: values differ by up to {most:g} from the samples; {allowed} are allowed"
        )


def straw_man(sort: str, rate: float, us: float) -> str:
    """Return why the authors' way is no fair peer at this rate, or "".

    Args:
        sort: of sample.
        rate: its samples/s a core.
        us: time of the decoder it is scaled by, here.
    """
    expected = KNOWN[sort] * AUTHORS_DECODERS[sort].us / us
    if abs(rate / expected - 1) <= STRAW:
        return ""
    return (
        f"{sort}: the authors' way reads {rate:,.0f}/s; {expected:,.0f}/s are expected at this machine's speed, and "
        f"more than {STRAW:.0%} away from that it is no fair peer"
    )


class Opened:
    """A loader in its stride: every sample has been read once, every page of its memory written.

    One with processes of its own is closed between windows and started anew for the next.
    """

    def __init__(self, loader: Loader, data: Data) -> None:
        self.loader, self.data = loader, data
        self._batches: Iterator[Any] | None = None

    def window(self, seconds: float) -> Rate:
        """Time it for so many seconds, rounded up to whole batches."""
        if self._batches is None:
            self._batches = self.loader.open(self.data, False)
            for _ in range(len(self.data.files) // self.data.batch + 4):
                next(self._batches)
        workers = psutil.Process().children(recursive=True)
        samples, cpu, began = 0, _cpu_s(workers), time.perf_counter()
        while (wall := time.perf_counter() - began) < seconds or not samples:
            next(self._batches)
            samples += self.data.batch
        cpu = _cpu_s(workers) - cpu
        if self.loader.processes:
            self.close()
        return Rate(per_cpu_s=samples / cpu, per_s=samples / wall)

    def close(self) -> None:
        """End it."""
        if self._batches is not None:
            close(self._batches)
        self._batches = None


def _cpu_s(workers: Sequence[psutil.Process]) -> float:
    times = [worker.cpu_times() for worker in workers]
    return time.process_time() + sum(one.user + one.system for one in times)


def close(batches: Iterator[Any]) -> None:
    """End a loader with its processes, now."""
    end = getattr(batches, "close", None)
    if end is not None:
        end()


def calibrate(calibration: Calibration, items: Sequence[bytes]) -> float:
    """Return the microseconds of CPU a decoder takes for an item, the median."""
    times = []
    for item in items:
        began = time.process_time()
        calibration.decode(item)
        times.append(time.process_time() - began)
    return 1e6 * statistics.median(times)


def growth(loader: Loader, data: Data, first: int, last: int) -> int:
    """Return the bytes this process takes over `last` samples, at most, beyond what it took after the `first`."""
    me, batches = psutil.Process(), loader.open(data, False)
    samples, before, most = 0, 0, 0
    while samples < last:
        next(batches)
        samples += data.batch
        if samples <= first or not before:
            before = most = me.memory_info().rss
        elif samples % 1024 < data.batch or samples >= last:
            most = max(most, me.memory_info().rss)
    close(batches)
    return most - before


def growth_afresh(data: Data, first: int, last: int) -> int:
    """Return `growth` of our stream in a fresh process: in the memory this one has freed, a leak would hide."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth_of_ours, data, first, last).result()


def _growth_of_ours(data: Data, first: int, last: int) -> int:
    torch.set_num_threads(1)
    return growth(ours(0), data, first, last)
