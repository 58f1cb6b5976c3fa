"""What of vLLM 0.32 do we rely on that it does not promise? By name, so that an upgrade says so.

A test that fails here after an upgrade names what changed and who uses it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from vllm import _custom_ops
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate import api_router
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.exception_handling.handlers import vllm_error
from vllm.tracing import otel
from vllm.utils import gc_utils
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.kv_offload.cpu import host_register, swap_blocks_triton
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import gpu_model_runner, kv_connector_model_runner_mixin
from vllm.v1.worker.gpu import kv_connector as gpu_kv_connector
from vllm.v1.worker.gpu_input_batch import InputBatch

from api.asking import ROUTES
from api.client import PipelineLLM
from api.core import PipelineCore


def assigned(function: Callable[..., Any]) -> set[str]:
    """Attributes of `self` that `function` sets."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_our_engine_client_has_every_attribute_of_vllms() -> None:
    # AsyncLLM's own __init__ would start an engine, so that ours sets what its methods read.
    only_there = {"_frontend_profiler_worker_name"}  # of a profiler that we never make

    assert assigned(AsyncLLM.__init__) - only_there == assigned(PipelineLLM.__init__)


def test_our_engine_core_answers_all_that_requests_ask_for() -> None:
    source = inspect.getsource(AsyncLLM)
    asked = {name for name in dir(EngineCoreClient) if f"engine_core.{name}(" in source}

    # The others are an operator's, of one engine of his own.
    of_operators = re.compile(
        r"elastic_ep|lora|sleep|wake_up|reset_|weight|profile|fault|status|kv_event|collective_rpc"
        r"|kv_cache_memory|dp_engines"
    )
    wanted = {name for name in asked if not of_operators.search(name)}
    assert len(wanted) > 3
    assert wanted <= vars(PipelineCore).keys()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (AsyncLLM.add_request, ["self", "request_id", "prompt", "params"]),
        (AsyncLLM.generate, ["self", "prompt", "sampling_params", "request_id"]),
        (AsyncLLM.check_admission, ["self", "n", "request_id"]),
        (OutputProcessor.add_request, ["self", "request", "prompt"]),
        (StructuredOutputManager.grammar_init, ["self", "request"]),
        (StructuredOutputManager.accept_tokens, ["self", "request"]),
        (InputBatch.add_request, ["self", "request"]),
        (cpu_attn._get_attn_isa, ["dtype", "block_size"]),
        (GenerateBaseServing._preflight, ["self", "n"]),
    ],
)
def test_what_we_wrap_or_override_is_called_as_we_expect(
    function: Callable[..., Any], expected: list[str]
) -> None:
    assert parameters(function)[: len(expected)] == expected


def test_a_request_is_admitted_before_its_response_begins() -> None:
    assert "self.engine_client.check_admission(n)" in inspect.getsource(
        GenerateBaseServing._preflight
    )


def test_vllm_forgets_nothing_that_it_aborts_only_after_it_was_added() -> None:
    # `PipelineCore.add_request_async` never suspends and never raises for this reason.
    source = inspect.getsource(AsyncLLM._add_request)
    assert source.index("output_processor.add_request") < source.index("add_request_async")


def test_the_stream_of_text_is_where_we_put_another() -> None:
    assert {"tokenizer", "skip_special_tokens", "stream"} <= assigned(
        FastIncrementalDetokenizer.__init__
    )
    source = inspect.getsource(FastIncrementalDetokenizer._protected_step)
    assert "self.stream.step(self.tokenizer, next_token_id)" in source


@pytest.mark.parametrize(
    ("route", "serving"),
    [
        ("/v1/chat/completions", OpenAIServingChat),
        ("/v1/completions", OpenAIServingCompletion),
        ("/v1/responses", OpenAIServingResponses),
    ],
)
def test_jobs_find_vllms_handlers_in_the_apps_state(route: str, serving: type) -> None:
    assert f"state.{ROUTES[route].handler} = " in inspect.getsource(api_router)
    assert parameters(getattr(serving, ROUTES[route].method))[1:3] == ["request", "raw_request"]


def test_vllms_error_handlers_look_for_what_our_app_has() -> None:
    source = inspect.getsource(vllm_error)
    assert "req.app.state.server" in source
    assert "req.app.state.engine_client" in source


def test_a_connector_has_what_ours_reads() -> None:
    assert {"_kv_transfer_config", "_kv_cache_config"} <= assigned(KVConnectorBase_V1.__init__)
    assert hasattr(KVConnectorBase_V1, "_get_connector_metadata")


def test_records_of_transfers_travel_in_statistics() -> None:
    source = inspect.getsource(Scheduler.make_stats)
    assert "if not self.log_stats:\n            return None" in source
    assert "kv_connector_stats" in source


def test_a_cpu_sampler_draws_what_a_resumed_seed_skips() -> None:
    source = inspect.getsource(topk_topp_sampler)
    assert "torch.randint(" in source
    assert "exponential_(" in source


def test_an_engine_that_may_load_frees_no_block_that_a_step_still_writes() -> None:
    # Loads are copied beside the steps, ordered after none of them.
    source = inspect.getsource(Scheduler)

    assert "multiple_inflight_batches and kv_transfer_config.is_kv_consumer" in source
    assert "self.defer_block_free = True" in source


@pytest.mark.parametrize("runner", [gpu_kv_connector, kv_connector_model_runner_mixin])
def test_a_load_that_a_step_needs_begins_before_its_forward_pass(runner: ModuleType) -> None:
    assert "has_sync_kv_loads" in inspect.getsource(runner)


@pytest.mark.parametrize(
    "before_forward",
    [gpu_kv_connector.ActiveKVConnector.pre_forward, gpu_model_runner.GPUModelRunner.execute_model],
)
def test_each_step_asks_the_connector_before_it_writes(before_forward: Callable[..., Any]) -> None:
    # With or without preemptions: there a step waits for loads that vLLM takes for done.
    source = inspect.getsource(before_forward)
    assert ".handle_preemptions(kv_connector_metadata)" in source
    assert "if scheduler_output.preempted_req_ids" not in source


def test_vllm_asks_about_a_load_once_its_request_has_another_status() -> None:
    # `BlockLookup` sees by the status that vLLM takes the blocks for loaded.
    source = inspect.getsource(Scheduler._handle_blocked_waiting_request)
    assert "self._update_waiting_for_remote_kv(request)" in source
    assert "request.status = RequestStatus.WAITING" in source
    assert "self.finished_recving_kv_req_ids.add" in inspect.getsource(
        Scheduler._update_from_kv_xfer_finished
    )


def test_one_call_copies_between_the_cache_and_host_memory() -> None:
    parameters = inspect.signature(swap_blocks_triton.swap_blocks_batch).parameters
    assert [*parameters] == [
        "src_addrs", "dst_addrs", "sizes", "is_src_access_order_any", "bytes_per_chunk"
    ]  # fmt: skip
    assert "sizes + job) // 8" in inspect.getsource(swap_blocks_triton)  # multiples of 8 bytes
    ours = [*inspect.signature(_custom_ops.swap_blocks_batch).parameters]
    assert ours[:3] == ["src_ptrs", "dst_ptrs", "sizes"]
    assert [*inspect.signature(host_register.host_register).parameters] == ["ptr", "num_bytes"]
    assert [*inspect.signature(host_register.host_unregister).parameters] == ["ptr"]


def test_vllm_has_one_set_of_metrics_and_takes_earlier_ones_out_of_the_registry() -> None:
    # `api.engine_metrics` puts them aside before, and finds them as vLLM does.
    assert "unregister_vllm_metrics()" in inspect.getsource(PrometheusStatLogger.__init__)
    source = inspect.getsource(unregister_vllm_metrics)
    assert "registry._collector_to_names" in source
    assert 'collector._name.startswith("vllm:")' in source


def test_an_engine_of_ours_has_the_limits_of_vllm_serve() -> None:
    source = inspect.getsource(EngineArgs.get_batch_defaults)
    assert "UsageContext.OPENAI_API_SERVER: 8192" in source


def test_an_engine_that_has_started_looks_through_all_objects_once() -> None:
    # pdtasks/collecting.py: from then on garbage is looked for as ever.
    assert "freeze_gc_heap()" in inspect.getsource(EngineCore.__init__)
    assert "gc.collect(2)" in inspect.getsource(gc_utils.freeze_gc_heap)


def test_vllm_tells_no_trace_unless_it_is_asked_to() -> None:
    # `api.tracing` tells of `llm_request`; vLLM's own, of one engine's times, would be a second.
    assert (
        inspect.signature(OutputProcessor.__init__).parameters["tracing_enabled"].default is False
    )
    # Taken out in `PipelineLLM.add_request`: they are in the message's headers.
    assert "trace_headers=trace_headers" in inspect.getsource(AsyncLLM.generate)
    # Hidden from vLLM's processes by `pdtasks.tracing.not_vllms`.
    assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" in inspect.getsource(otel.init_otel_worker_tracer)
