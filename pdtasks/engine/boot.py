"""How is vLLM's engine core started: with which connector, in which environment?"""

from __future__ import annotations

import os

from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor

from pdtasks import collecting
from pdtasks.engine.arguments import engine_arguments
from pdtasks.settings import Settings
from pdtasks.tracing import not_vllms


async def start_core(
    settings: Settings, model: str, reports_to: str
) -> tuple[VllmConfig, EngineCoreClient]:
    """Start the engine core for `model`, a folder; may take minutes. Raises what vLLM raises.

    Args:
        reports_to: path of the socket that hears of transfers (`pdtasks.kv.reports`).
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if settings.device == "cpu":
        # The first request with logprobs would otherwise wait 40 s for a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_kv_cache_gib))
    # The connector reads its URLs there: vLLM logs its configuration, passwords and all.
    os.environ["PDTASKS_KV_URLS"] = ",".join(settings.kv_urls)
    arguments = engine_arguments(settings, model)
    options = {
        "ttl_s": settings.kv_ttl_s,
        "timeout_s": settings.kv_timeout_s,
        "connections": settings.kv_connections,
        "min_prefix_tokens": settings.kv_min_prefix_tokens,
        "ring_mib": settings.kv_ring_mib,
        "gpu_to_gpu": settings.kv_gpu_to_gpu,
        "reports_to": reports_to,
        "exit_with_pid": os.getpid(),
    }
    transfer = KVTransferConfig(
        kv_connector="ValkeyConnector",
        kv_connector_module_path="pdtasks.kv.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={k: v for k, v in options.items() if v is not None},
    )
    # Without it vLLM takes 2,048 tokens a step where `vllm serve` takes 8,192.
    config = AsyncEngineArgs(**arguments, kv_transfer_config=transfer).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER
    )
    collecting.rarely_in_children()
    with not_vllms():
        core = EngineCoreClient.make_async_mp_client(
            config,
            Executor.get_class(config),
            # Not for its figures: the connector's records of what is stored travel there.
            log_stats=True,
        )
    return config, core
