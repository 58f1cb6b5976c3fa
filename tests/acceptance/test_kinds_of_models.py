"""Which kinds of attention can be handed over? Tiny models with random weights, real engines."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pdtasks.cluster.valkey import ValkeyServer
from tests.acceptance.nursery import Nursery
from tests.acceptance.tiny_model import PROMPT_TOKENS

_SHAPE: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = 128  # tokens, less than the prompt
LLAMA = _SHAPE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SLIDING_AND_FULL = _SHAPE | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": _WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 32,
    "hidden_activation": "gelu_pytorch_tanh",
}
SLIDING_ONLY = _SHAPE | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": _WINDOW,
}
MLA = _SHAPE | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    # The one size of a latent that vLLM's CPU backend knows: 512 and 64.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "q_lora_rank": None,
    "v_head_dim": 32,
    "first_k_dense_replace": 4,  # no layer has experts
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 64,
    "rope_theta": 10000.0,
}


#: Of which one process makes an engine after the other: most of an engine's start is the process's.
ONE_RANK = {
    "sliding window and full attention": SLIDING_AND_FULL,
    "MLA": MLA,
    "sliding window only": SLIDING_ONLY,
}
TWO_RANKS = {"tensor parallelism 2": LLAMA}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> dict[str, dict[str, Any]]:
    """What the engines have found, by kind."""
    folder = tmp_path_factory.mktemp("kinds")
    with ValkeyServer(folder, "kv") as server, ThreadPoolExecutor(2) as both:
        one = both.submit(_hand_over, ONE_RANK, 1, server, folder / "one", nursery)
        two = both.submit(_hand_over, TWO_RANKS, 2, server, folder / "two", nursery)
        return one.result() | two.result()


def _hand_over(
    configs: dict[str, dict[str, Any]],
    ranks: int,
    server: ValkeyServer,
    folder: Path,
    nursery: Nursery,
) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    out, log, asked = folder / "found.json", folder / "log", folder / "asked.json"
    asked.write_text(json.dumps({"configs": configs, "ranks": ranks}))
    env = os.environ | {
        "PDTASKS_KV_URLS": server.url,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
    }
    argv = [sys.executable, str(Path(__file__).with_name("tiny_model.py")), str(out)]
    with log.open("w") as said, asked.open() as stdin:
        program = nursery.start(argv, env, said, stdin=stdin)
    try:
        assert program.wait(timeout=200) == 0, log.read_text()[-3000:]
    finally:
        # vLLM's processes are in the group.
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    "kind", ["tensor parallelism 2", "sliding window and full attention", "MLA"]
)
def test_a_prompt_is_handed_over_to_the_last_bit(
    kind: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[kind]["handed_over"] == found[kind]["alone"]
    assert found[kind]["loaded_tokens"] == PROMPT_TOKENS


def test_layers_that_forget_the_prompt_are_refused_in_one_sentence(
    found: dict[str, dict[str, Any]],
) -> None:
    refusal = found["sliding window only"]["refused"]

    assert refusal.startswith("pdtasks hands over models whose layers keep the whole prompt")
