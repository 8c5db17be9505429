"""Preallocated batches that reading processes fill and one process uses, without a copy in between.

The memory is anonymous and shared by fork: no file in /dev/shm, whose 64 MB in a container are the usual end of a
loader. A batch is handed out as a view and its slot is free again when the last tensor over it is gone.
"""

import atexit
import mmap
import os
import time
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_POLL_S = 0.0005
_PAGE = 4096


_open_rings: "weakref.WeakSet[BatchRing]" = weakref.WeakSet()


@atexit.register  # before multiprocessing waits for readers that would wait for us
def _close_all() -> None:
    for ring in list(_open_rings):
        ring.close()


class RingClosed(Exception):
    """Nobody takes batches any more."""


class BatchRing:
    """Slots for batches, used in turn: batch `number` lies in slot `number % slots`.

    Args:
        slots: batches that exist at a time: one in use, one on its way to the device, the others being filled.
        slot_bytes: of the largest batch.
        pin: lock the pages, so that a GPU copies from them asynchronously.
    """

    def __init__(self, slots: int, slot_bytes: int, *, pin: bool) -> None:
        self.slots, self.slot_bytes = slots, max(_PAGE, -(-slot_bytes // _PAGE) * _PAGE)
        self._memory = mmap.mmap(-1, slots * self.slot_bytes)
        shared = np.frombuffer(mmap.mmap(-1, (slots + 1) * 8), dtype=np.int64)
        self._released = shared[:slots]  # times each slot was set free
        self._closed = shared[slots:]  # one number: 1 at the end
        self._owner, self._held = os.getpid(), 0
        _open_rings.add(self)
        if pin:
            everything = np.frombuffer(self._memory, dtype=np.uint8)
            cudart: Any = torch.cuda.cudart
            cuda = cudart()
            code = cuda.cudaHostRegister(everything.ctypes.data, everything.nbytes, 0)
            if int(code) != 0:
                raise RuntimeError(
                    f"{everything.nbytes >> 20} MiB of batches cannot be locked (CUDA error {code})"
                )
            weakref.finalize(self, cuda.cudaHostUnregister, everything.ctypes.data)

    def rows(self, number: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return the array of a batch, for a reader to fill; waits until the slot's last batch is no longer used.

        Raises:
            RingClosed: nobody will use the batch.
        """
        slot, turn = number % self.slots, number // self.slots
        while self._released[slot] < turn:
            time.sleep(_POLL_S)
            if self.closed:
                raise RingClosed
        return self._view(slot, shape, dtype)

    def take(self, number: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """Hand out a filled batch; its slot is free again when the last tensor over it is gone."""
        view = self._view(number % self.slots, shape, dtype)
        self._held += 1
        weakref.finalize(view, self._release, number % self.slots)
        return torch.from_numpy(view)  # keeps this very array alive

    def close(self) -> None:
        """Tell the readers, in all processes, that nobody takes batches any more; only its maker can."""
        if os.getpid() == self._owner:  # not a copy in a forked reader
            self._closed[0] = 1

    @property
    def closed(self) -> bool:
        """Whether `close` was called, in any process, or the process that took the batches is gone."""
        orphaned = os.getpid() != self._owner and os.getppid() != self._owner
        return bool(self._closed[0]) or orphaned

    def check_free(self) -> None:
        """Raise RuntimeError where every batch is still held: readers would wait for ever."""
        if self._held >= self.slots:
            raise RuntimeError(
                f"all {self.slots} batches of the loader are still in use; clone what is kept beyond a step"
            )

    def _release(self, slot: int) -> None:
        self._held -= 1
        self._released[slot] += 1

    def _view(self, slot: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        count = int(np.prod(shape))
        return np.frombuffer(self._memory, dtype=dtype, count=count, offset=slot * self.slot_bytes).reshape(
            shape
        )


class CopiesUnderWay:
    """Host tensors a GPU is still copying from, kept alive until it has."""

    def __init__(self) -> None:
        self._copies: deque[tuple[Any, Tensor]] = deque()

    def add(self, tensor: Tensor) -> None:
        """Keep a tensor until the copy that was just issued on the current stream is done."""
        make_event: Any = torch.cuda.Event
        event = make_event()
        event.record()
        self._copies.append((event, tensor))

    def let_go(self, most: int) -> None:
        """Forget finished copies; wait for the oldest ones where more than `most` are under way."""
        while self._copies and (self._copies[0][0].query() or len(self._copies) > most):
            self._copies[0][0].synchronize()
            self._copies.popleft()
