"""Whose KV is this? The fingerprint of an engine, from vLLM's configuration.

Computed alike in the scheduler's and in each worker's process.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import vllm
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from pdtasks.kv.keys import Fingerprint
from pdtasks.kv.pages import block_bytes

#: Bytes read at each of a weight file's sample points.
_SAMPLE_BYTES = 4096
#: Sample points of a whole file, whatever its format.
_SAMPLES = 16
#: The format's own limit.
_MOST_HEADER_BYTES = 100_000_000


def fingerprint(config: VllmConfig, kv_config: KVCacheConfig) -> Fingerprint:
    """Describe the engine that `config` and `kv_config` make."""
    model = config.model_config
    return Fingerprint(
        model=model_digest(model.model, model.revision, config.load_config.load_format),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=str(config.cache_config.cache_dtype),
        block_size=config.cache_config.block_size,
        block_bytes=block_bytes(kv_config),
        layout=str(kv_config.kv_cache_layout),
        num_layers=sum(len(group.layer_names) for group in kv_config.kv_cache_groups),
        tp_size=config.parallel_config.tensor_parallel_size,
        vllm_version=vllm.__version__,
    )


def model_digest(name: str, revision: str | None, load_format: str) -> str:
    """Tell models apart by content where the files are at hand, else by name and revision.

    A fine-tune has its base model's configuration and often its folder's name, and may have left
    most layers alone, so each tensor is sampled: a few KiB at its beginning and in its middle.
    """
    digest = hashlib.sha256(load_format.encode())
    folder = Path(name)
    if not (folder / "config.json").is_file():
        digest.update(json.dumps([name, revision]).encode())
        return digest.hexdigest()[:16]
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for offset in _tensor_offsets(file) if path.suffix == ".safetensors" else ():
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _tensor_offsets(file: BinaryIO) -> Iterator[int]:
    """Places of a safetensors file: the beginning and the middle of each tensor.

    https://github.com/huggingface/safetensors#format: the header's length as 8 bytes, the header as
    JSON, then the tensors, whose offsets count from there.  Nothing for a file that is none.
    """
    try:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(min(header_bytes, _MOST_HEADER_BYTES)))
        tensors.pop("__metadata__", None)
        spans = [tensor["data_offsets"] for tensor in tensors.values()]
    except (struct.error, ValueError, KeyError, AttributeError, TypeError):
        return  # vLLM will say what is wrong with it
    for begin, end in spans:
        yield 8 + header_bytes + begin
        yield 8 + header_bytes + (begin + end) // 2
