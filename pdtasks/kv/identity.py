"""Whose KV is this? The fingerprint of an engine, from vLLM's configuration.

Computed alike in the scheduler's and in each worker's process.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
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
        model=model_digest(
            model.model,
            model.revision or getattr(model.hf_config, "_commit_hash", None),
            config.load_config.load_format,
            {
                # As the engine uses it: `hf_overrides` change keys as much as weights do.
                "config": _plain(model.hf_config.to_dict()),
                "quantization": model.quantization,
            },
        ),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=str(config.cache_config.cache_dtype),
        block_size=config.cache_config.block_size,
        block_bytes=block_bytes(kv_config),
        layout=str(kv_config.kv_cache_layout),
        packing=_packing(config),
        num_layers=sum(len(group.layer_names) for group in kv_config.kv_cache_groups),
        tp_size=config.parallel_config.tensor_parallel_size,
        vllm_version=vllm.__version__,
    )


def _packing(config: VllmConfig) -> str:
    """CPU attention packs keys and values as the host's instruction set likes them."""
    if not current_platform.is_cpu():
        return str(current_platform.device_type)
    model = config.model_config
    isa = _get_attn_isa(
        cast("torch.dtype", model.dtype),
        config.cache_config.block_size,
        model.get_head_size(),
        config.cache_config.cache_dtype,
    )
    return f"cpu {isa}"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration without what differs between hosts."""
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}


def model_digest(
    name: str, revision: str | None, load_format: str, used_as: dict[str, Any] | None = None
) -> str:
    """Tell models apart by content where the files are at hand, else by name and revision.

    A fine-tune has its base model's configuration and often its folder's name, and may have left
    most layers alone, so each tensor is sampled: a few KiB at its beginning and in its middle.

    Args:
        used_as: further facts that the KV depends on.
    """
    digest = hashlib.sha256(load_format.encode())
    digest.update(json.dumps(used_as, sort_keys=True, default=str).encode())
    path = Path(name)
    files = [path] if path.is_file() else []
    if (path / "config.json").is_file():
        digest.update((path / "config.json").read_bytes())
        files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    elif not files:
        digest.update(json.dumps([name, revision]).encode())
    for file in files:
        _sample(file, digest)
    return digest.hexdigest()[:16]


def _sample(path: Path, digest: hashlib._Hash) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        offsets = [size * sample // _SAMPLES for sample in range(_SAMPLES)]
        if path.suffix == ".safetensors":
            offsets += _tensor_offsets(file)
        for offset in offsets:
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))


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
