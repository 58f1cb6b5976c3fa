"""Which vLLM is this, and with which arguments do workers and API run it?"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from vllm.config import StructuredOutputsConfig
from vllm.config.reasoning import ReasoningConfig

from pdtasks.errors import ConfigurationError
from pdtasks.settings import Settings

#: Which vLLM speaks here; structures of another version are refused.
ENGINE_VERSION = f"vllm {vllm.__version__}"

#: Context of a CPU engine unless `max_model_len` says otherwise: its start-up grows with it.
DEFAULT_CPU_MODEL_LEN = 2048  # tokens


def engine_arguments(settings: Settings, model: str) -> dict[str, Any]:
    """vLLM's engine arguments, the same for workers and for the API that validates for them."""
    arguments: dict[str, Any] = {
        "model": model,
        "served_model_name": settings.model_name,
        "max_num_seqs": settings.max_num_seqs,
    }
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if settings.device == "cuda":
        # A block is one value in the store; vLLM's 16 tokens would make many small ones.
        arguments["block_size"] = 64
    if settings.device == "cpu":
        length = arguments.setdefault("max_model_len", DEFAULT_CPU_MODEL_LEN)
        arguments |= {
            "enforce_eager": True,
            # A seeded request whose prompt is computed in chunks kills vLLM 0.32's CPU engine.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(length, 2048),
        }
        if torch.backends.cpu.get_cpu_capability() == "AVX2":
            # These CPUs multiply 16-bit numbers one by one: prefill takes five times as long as in
            # float32.  All workers need the same, or none can load what another has stored.
            arguments["dtype"] = "float32"
        if settings.engine_args.get("tensor_parallel_size", 1) == 1:
            # One process less to start: 12 s instead of 45 s. vLLM rewrites the short name "uni".
            arguments["distributed_executor_backend"] = (
                "vllm.v1.executor.uniproc_executor.UniProcExecutor"
            )
    if settings.engine_args.get("disable_log_stats"):
        raise ConfigurationError(
            "PDTASKS_ENGINE_ARGS: disable_log_stats cannot be used: that a prompt's KV is stored "
            "travels in vLLM's statistics, and each hand-over would wait for it in vain"
        )
    arguments |= settings.engine_args
    if isinstance(reasoning := arguments.get("reasoning_config"), dict):
        # vLLM's command line does so; with a reasoning parser beside it, vLLM expects no dict.
        arguments["reasoning_config"] = ReasoningConfig(**reasoning)
    # An engine has one backend for structured outputs: with vLLM's "auto" the first request decides
    # for all that follow, and the same schema is taken or refused by what came before.
    structured: dict[str, Any] = {"backend": "xgrammar"}
    structured |= arguments.get("structured_outputs_config", {})
    arguments["structured_outputs_config"] = StructuredOutputsConfig(**structured)
    return arguments
