"""vLLM engines of tiny models with random weights hand a prompt over to themselves.

Run as a program: it reads from standard input `{"configs": {name: {…}}, "ranks": 1}` (Hugging Face
configurations, the size of the tensor-parallel group).  An engine of each, one after the other,
computes a prompt alone, then with a save, forgets everything, loads it and goes on.  To the file
named on the command line it writes for each name `{"alone", "handed_over", "loaded_tokens"}` (lists
of token id and logprob, and how much of the prompt was loaded), or `{"refused"}` with what the
engine said.  The kv servers come from PDTASKS_KV_URLS.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pdtasks import collecting

PROMPT_TOKENS = 300
OUTPUT_TOKENS = 6
_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def hand_over(config: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.config import KVTransferConfig

    from pdtasks.kv import params

    (folder / "config.json").write_text(json.dumps(config))
    engine = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend=None if ranks > 1 else _ONE_PROCESS,
        max_model_len=512,
        max_num_batched_tokens=1024,
        enable_chunked_prefill=False,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="ValkeyConnector",
            kv_connector_module_path="pdtasks.kv.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
        tensor_parallel_size=ranks,
    )
    prompt = TokensPrompt(prompt_token_ids=[(7 * n) % 90 + 5 for n in range(PROMPT_TOKENS)])

    def run(max_tokens: int, transfer: dict[str, Any]) -> Any:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            extra_args={"kv_transfer_params": transfer},
        )
        return engine.generate(prompt, sampling, use_tqdm=False)[0]

    def logprobs(answer: Any) -> list[tuple[int, float]]:
        output = answer.outputs[0]
        return [
            (token, step[token].logprob)
            for token, step in zip(output.token_ids, output.logprobs, strict=True)
        ]

    alone = run(OUTPUT_TOKENS, params.load(None, []))
    engine.reset_prefix_cache()
    saved = run(1, params.save("tiny"))
    handle = params.ours(saved.kv_transfer_params)["handle"]
    # Until the blocks are stored the engine holds them, and cannot forget them.
    for _ in range(200):
        if engine.reset_prefix_cache():
            break
        run(1, params.load(None, []))
    else:
        raise RuntimeError("the engine still holds the blocks")
    rest = run(OUTPUT_TOKENS, params.load(handle, list(saved.outputs[0].token_ids)))
    engine.llm_engine.engine_core.shutdown()
    return {
        "alone": logprobs(alone),
        "handed_over": logprobs(saved) + logprobs(rest),
        "loaded_tokens": rest.num_cached_tokens,
    }


if __name__ == "__main__":
    os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
    # In this process: another one would import everything once more.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Those of a tensor-parallel group are other processes.
    collecting.rarely_in_children()
    case = json.load(sys.stdin)
    found: dict[str, Any] = {}
    for name, config in case["configs"].items():
        with tempfile.TemporaryDirectory() as made:
            try:
                found[name] = hand_over(config, case["ranks"], Path(made))
            except ValueError as refusal:
                found[name] = {"refused": str(refusal)}
    Path(sys.argv[1]).write_text(json.dumps(found))
