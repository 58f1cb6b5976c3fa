"""The reference: one ordinary vLLM engine, no connector, no hand-over. Run as a program.

Reads cases from standard input, `[{"prompt": [token id, …], "sampling": {…}}, …]`, and writes the
answers, `[{"token_ids", "logprobs", "finish_reason"}, …]`, to the file named on the command line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.models import resolve_model
from pdtasks.settings import load_settings

if TYPE_CHECKING:
    from vllm.logprobs import Logprob


def answers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    settings = load_settings()
    model = resolve_model(settings.model, settings.cache_dir, lambda _: None)
    # Without its prefix cache every prompt is computed in full, as a fresh prefill worker would.
    engine = LLM(**engine_arguments(settings, model), enable_prefix_caching=False)
    found = []
    for case in cases:
        if bias := case["sampling"].get("logit_bias"):  # JSON knows no integer keys
            case["sampling"]["logit_bias"] = {int(token): value for token, value in bias.items()}
        if grammar := case["sampling"].get("structured_outputs"):
            case["sampling"]["structured_outputs"] = StructuredOutputsParams(**grammar)
        sampling = SamplingParams(**case["sampling"])
        prompt = TokensPrompt(prompt_token_ids=case["prompt"])
        answer = engine.generate(prompt, sampling, use_tqdm=False)[0].outputs[0]
        logprobs = cast("list[dict[int, Logprob]]", answer.logprobs or [])
        found.append(
            {
                "token_ids": list(answer.token_ids),
                "logprobs": [
                    step[token].logprob
                    for token, step in zip(answer.token_ids, logprobs, strict=True)
                ],
                "finish_reason": answer.finish_reason,
            }
        )
    return found


if __name__ == "__main__":
    os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="0", HF_HUB_OFFLINE="1")
    # In this process: another one would import everything once more.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    Path(sys.argv[1]).write_text(json.dumps(answers(json.load(sys.stdin))))
