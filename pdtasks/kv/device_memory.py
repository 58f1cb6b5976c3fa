"""Memory of a GPU that several processes of a host read: CUDA's IPC, through vLLM's wrapper.

A process that was started with another GPU alone (`CUDA_VISIBLE_DEVICES`) can map it all the same,
where the two GPUs reach each other.  Measured on two H200 with NVLink: 333 GB/s by the copy engine,
in whatever process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary, cudaIpcMemHandle_t

#: Of a handle that another process opens.
HANDLE_BYTES = 64


class DeviceMemoryError(Exception):
    """It cannot be shared, or not be reached from here."""


class SharedRegion(NamedTuple):
    """Rows of a cache in memory that other processes can map."""

    handle: bytes  #: of the allocation in which they lie
    offset: int  #: bytes from its begin to row 0
    stride: int  #: bytes from one row to the next


class DeviceMemory:
    """Another process's allocation in this process's address space."""

    def __init__(self, address: int, close: Callable[[], None]) -> None:
        self.address = address
        self._close = close

    def close(self) -> None:
        """Let go of it."""
        # A GPU that is gone takes all its memory along.
        with suppress(RuntimeError):
            self._close()


def share(regions: Sequence[torch.Tensor]) -> list[SharedRegion]:
    """Let others map the allocations in which these tensors `(rows, bytes)` lie, int8, on CUDA.

    Raises DeviceMemoryError for memory that CUDA's IPC does not know, as that of vLLM's sleep mode.
    """
    library = CudaRTLibrary()
    shared = []
    for region in regions:
        with torch.cuda.device(region.device):
            base = _allocation_of(region.data_ptr())
            try:
                handle = library.cudaIpcGetMemHandle(ctypes.c_void_p(base))
            except RuntimeError as exc:
                library.funcs["cudaGetLastError"]()  # or the engine's next call would report it
                raise DeviceMemoryError(str(exc)) from exc
        wire = bytes(handle.internal)[:HANDLE_BYTES]
        shared.append(SharedRegion(wire, region.data_ptr() - base, region.stride(0)))
    return shared


def _allocation_of(address: int) -> int:
    """Where the allocation begins in which `address` lies. Raises DeviceMemoryError."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    try:
        code = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
    except (OSError, AttributeError) as exc:
        raise DeviceMemoryError(f"CUDA's driver cannot be asked ({exc})") from exc
    if code:
        raise DeviceMemoryError(f"CUDA's driver does not know the cache's memory (error {code})")
    return base.value


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
