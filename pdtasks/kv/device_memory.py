"""Memory of a GPU that several processes of a host read: CUDA's IPC, through vLLM's wrapper.

A process that was started with another GPU alone (`CUDA_VISIBLE_DEVICES`) can map it all the same,
where the two GPUs reach each other.  Measured on two H200 with NVLink: 333 GB/s by the copy engine,
in whatever process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

import torch
from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary, cudaIpcMemHandle_t

#: Of a handle that another process opens.
HANDLE_BYTES = 64


class DeviceMemoryError(Exception):
    """There is not so much, or it cannot be reached from here."""


class DeviceMemory:
    """A range of a GPU's memory in this process's address space."""

    def __init__(self, address: int, close: Callable[[], None], handle: bytes = b"") -> None:
        self.address = address
        self.handle = handle  #: names it to others; empty: it is another process's
        self._close = close

    def close(self) -> None:
        """Let go of it."""
        # A GPU that is gone takes all its memory along.
        with suppress(RuntimeError):
            self._close()


def allocate(num_bytes: int, device: torch.device) -> DeviceMemory:
    """Take memory that others may read. Raises DeviceMemoryError."""
    with torch.cuda.device(device):
        library = CudaRTLibrary()
        try:
            pointer = library.cudaMalloc(num_bytes)
            handle = library.cudaIpcGetMemHandle(pointer)
        except RuntimeError as exc:
            raise DeviceMemoryError(str(exc)) from exc
    assert pointer.value is not None
    return DeviceMemory(
        pointer.value, lambda: library.cudaFree(pointer), bytes(handle.internal)[:HANDLE_BYTES]
    )


def open_peer(handle: bytes, device: torch.device) -> DeviceMemory:
    """Map another process's memory for `device`. Raises DeviceMemoryError."""
    with torch.cuda.device(device):
        library = CudaRTLibrary()
        wire = cudaIpcMemHandle_t()
        ctypes.memmove(wire.internal, handle, HANDLE_BYTES)
        try:
            pointer = library.cudaIpcOpenMemHandle(wire)
        except RuntimeError as exc:
            library.funcs["cudaGetLastError"]()  # or the engine's next call would report it
            raise DeviceMemoryError(str(exc)) from exc
    assert pointer.value is not None
    return DeviceMemory(pointer.value, lambda: library.lib.cudaIpcCloseMemHandle(pointer))


def free_bytes(device: torch.device) -> int:
    """That nobody has taken."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
