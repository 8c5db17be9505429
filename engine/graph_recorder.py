"""What records CUDA graphs, and where a stage's steps can be graphs at all.

Source: Ng et al., "Accelerating PyTorch with CUDA Graphs" (pytorch.org/blog, 2021).
"""

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class Recorder(Protocol):
    """What makes graphs: CUDA's, or a stand-in."""

    def aside(self, work: Work, *, may_wait: bool) -> None:
        """Run work where it will be captured, but for real; where it may not wait for the device, raise if it does."""

    def capture(self, work: Work) -> Work:
        """Return what does the work again on the same tensors, any number of times."""


class CudaRecorder:
    """CUDA's graphs; all made by one recorder share a memory pool, and must never run at the same time.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # one stream: memory of the pool is taken again by captures of the same stream only
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Work, *, may_wait: bool) -> None:
        """Run work on the stream of the captures: its workspaces are made now, outside of the pool.

        Raises:
            RuntimeError: the work waits for the device, and may not; a capture would not survive it.
        """
        current, before = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            if not may_wait:
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self._stream):
                work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            current.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        """Capture work; nothing is computed until it is replayed.

        Raises:
            RuntimeError: CUDA or the work refuses.
        """
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # an old step's autograd nodes would tie the capture to the stream they were made on
        collects = gc.isenabled()
        gc.disable()  # a collection might free another graph, which CUDA refuses meanwhile
        try:
            # thread_local: the loader's threads go on calling CUDA
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        finally:
            if collects:
                gc.enable()
        return graph.replay


def refusal(
    *, device: torch.device, zero: int, accumulate: int, user: dict[str, Any] | None = None
) -> str | None:
    """Return why a stage's steps cannot be graphs and what to do, as the end of a sentence; None if they can.

    Texts never are: their batches differ in shape.

    Args:
        device: that computes.
        zero: ZeRO stage.
        accumulate: micro-batches of one update on this rank.
        user: the user's DeepSpeed configuration.
    """
    if device.type != "cuda":
        return f"the device is {device.type}; use a CUDA device"
    if zero > 2:
        return f"ZeRO {zero} moves the weights in every step; set parallel.zero to 0, 1 or 2"
    if accumulate > 1:
        return f"an update is made of {accumulate} micro-batches; raise training.micro_batch or lower training.batch"
    config = user or {}
    if config.get("torch_autocast", {}).get("enabled", False):
        return "the DeepSpeed configuration enables torch_autocast; remove it there"
    for key, entry in config.get("zero_optimization", {}).items():
        if key.startswith("offload_") and isinstance(entry, dict) and entry.get("device", "none") != "none":
            return f"the DeepSpeed configuration sets {key}; remove it there"
    return None
