"""How does a request arrive in an engine with output tokens already there?

Decode must behave as if it had made the first tokens itself: penalties, seeds, grammar, stop rules.
To vLLM such a request looks like a preempted one that resumes.  Three places have to know:

* the scheduler's `Request`: the tokens are appended to its output (`carry_over`);
* the grammar of a structured output: advanced over the tokens (`advance_grammar`);
* the V1 model runner (CPU), which assumes that a new request has no output yet: its
  `InputBatch.add_request` is wrapped when this module is imported.  The V2 runner (CUDA) rebuilds
  all of it from the prompt and output tokens that the scheduler sends.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from pdtasks.kv import params


def resume_tokens(wire: params.Params | None) -> list[int]:
    """Output tokens that came with `kv_transfer_params`; empty for an ordinary request."""
    return list(params.ours(wire).get("resume") or ())


def carry_over(request: Request) -> None:
    """Give a new `request` the output tokens that another engine has made."""
    tokens = resume_tokens(request.kv_transfer_params)
    if tokens and request.num_output_tokens == 0:
        request.append_output_token_ids(tokens)
        if len(tokens) > 1:
            # vLLM asserts that cached tokens end within the prompt when it takes these statistics.
            request.prefill_stats = None


def advance_grammar(request: Request) -> None:
    """Move the grammar of a resumed `request` past its output tokens, once it is compiled.

    Call it when the scheduler considers the request: by then the grammar is ready.
    """
    manager = getattr(request, "_pdtasks_grammar_manager", None)
    if manager is None or not resume_tokens(request.kv_transfer_params):
        return
    del request._pdtasks_grammar_manager  # type: ignore[attr-defined]  # noqa: SLF001
    manager.accept_tokens(request, list(request.output_token_ids))


def _remember_grammar_manager() -> None:
    # The scheduler hands a connector no reference to the manager; grammar_init meets every request
    # that needs it.
    original = StructuredOutputManager.grammar_init

    @wraps(original)
    def grammar_init(self: StructuredOutputManager, request: Request) -> Any:
        if request.structured_output_request is not None:
            request._pdtasks_grammar_manager = self  # type: ignore[attr-defined]  # noqa: SLF001
        return original(self, request)

    StructuredOutputManager.grammar_init = grammar_init  # type: ignore[method-assign]


def _teach_v1_runner() -> None:
    original = InputBatch.add_request

    @wraps(original)
    def add_request(self: InputBatch, request: CachedRequestState) -> int:
        sampling = request.sampling_params
        tokens: list[int] = []
        if sampling is not None and not request.output_token_ids:
            tokens = resume_tokens((sampling.extra_args or {}).get("kv_transfer_params"))
        if tokens:
            request.output_token_ids.extend(tokens)
            if request.generator is not None:
                _advance_generator(request.generator, len(tokens), self.vocab_size)
        return original(self, request)

    InputBatch.add_request = add_request  # type: ignore[method-assign]


def _advance_generator(generator: torch.Generator, steps: int, vocab_size: int) -> None:
    """Draw what vLLM's sampler would have drawn for `steps` tokens of a seeded request.

    vLLM 0.32, v1/sample/ops/topk_topp_sampler.py: one integer for each token on CPU
    (`forward_cpu`), one row of exponentials elsewhere (`random_sample`).
    """
    device = generator.device
    for _ in range(steps):
        if device.type == "cpu":
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        else:
            torch.empty(vocab_size, dtype=torch.float32, device=device).exponential_(
                generator=generator
            )


_remember_grammar_manager()
_teach_v1_runner()
