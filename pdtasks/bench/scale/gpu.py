"""How long does a GPU take? One H200, Llama-3.1-8B shape, from rows of bench/results.

Every constant names the row that it comes from; the rows are of
`2026-11-30-h200x2-4d57b95-a.json` unless another file is named.  What no row tells by itself was
chosen so that the model meets the rows (`pdtasks.bench.scale.validate` prints both).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Final

#: Bytes of KV of one token: 32 layers, 8 KV heads of 128, keys and values, 2 bytes each.
KV_BYTES_OF_TOKEN: Final = 131_072

#: Seconds of a step that computes so many prompt tokens and nothing else.  Up to 2,048: TTFT split
#: of `2026-11-30-h200x2-route-0.json` (20, 24, 34, 36, 39, 62 ms) without what API and RabbitMQ
#: take of it (6 ms).  Beyond: 5000/250 of `pdtasks 1P1D` and `one` at 4 and 6/s and of `pair` (file
#: 9fcd1e7), whose TTFT, ITL p99 and end to end these two meet best (ITL p99 of `pair`, a step with
#: one whole prompt, is 102 ms; of `one` at 6/s, a full step, 220).
_PROMPT_STEP_S: Final = (
    (0, 0.0049),
    (64, 0.014),
    (128, 0.016),
    (256, 0.028),
    (512, 0.030),
    (1024, 0.033),
    (2048, 0.051),
    (5000, 0.117),
    (8192, 0.196),
)


@dataclass(frozen=True)
class Gpu:
    """Times of one engine on one GPU. Seconds."""

    #: Of a step with one request: ITL p50 of 128/20, one at a time: 4.9 ms.
    step_s: float = 0.0048
    #: More for each request: ITL p50 of 200/500, 64 at once (6.4 ms), less its KV's part.
    sequence_s: float = 5e-6
    #: More for each token of KV that is read: ITL p50 of 5000/250 at 4 and 6/s (6.3 and 7.0 ms),
    #: about 6 and 11 answers of 5,125 tokens.
    kv_token_s: float = 38e-9
    #: A prefill engine copies what it computes for others: TTFT of 5000/250 through host memory and
    #: from GPU to GPU differs by 7 % (176 and 188 ms at 4/s; 316 and 338 at 6/s).
    saving: float = 1.06
    #: The step that runs a request for the first time copies its KV: 3.7 ms for 5,000 tokens, 1.8
    #: for 2,048, 0.95 for 128 (`stages_ms`, decode, kv).
    load_token_s: float = 0.57e-6
    load_s: float = 0.0008
    #: Tokens of a step: vLLM's own choice for this GPU.
    step_tokens: int = 8192
    #: Answers of an engine at once: bench/gpu/plan.yaml.
    max_num_seqs: int = 128

    def prompt_step_s(self, tokens: int) -> float:
        """A step that computes `tokens` of prompts, beside no answers."""
        sizes = [size for size, _ in _PROMPT_STEP_S]
        at = min(bisect.bisect_left(sizes, tokens), len(sizes) - 1)
        (below, low), (above, high) = _PROMPT_STEP_S[max(0, at - 1)], _PROMPT_STEP_S[at]
        if above == below:
            return low
        return low + (high - low) * (tokens - below) / (above - below)

    def step_of(
        self, prompt_tokens: int, answers: int, kv_tokens: int, loaded: int, *, saves: bool
    ) -> float:
        """One step.

        Args:
            prompt_tokens: that it computes.
            answers: that get a token in it.
            kv_tokens: of those answers.
            loaded: tokens whose KV it copies from another engine.
            saves: is what it computes for another engine?
        """
        base = self.step_s
        if prompt_tokens:
            base = self.prompt_step_s(prompt_tokens) * (self.saving if saves else 1.0)
        load = self.load_s + loaded * self.load_token_s if loaded else 0.0
        return base + answers * self.sequence_s + kv_tokens * self.kv_token_s + load

    def prompts_per_s(self, prompt: int) -> float:
        """What one prefill engine can do with steps that are full."""
        together = max(1, self.step_tokens // prompt)
        if prompt >= self.step_tokens / 2:  # chunks of prompts fill each step
            seconds = self.prompt_step_s(self.step_tokens) * prompt / self.step_tokens
        else:
            seconds = self.prompt_step_s(together * prompt) / together
        return 1 / (self.saving * seconds)

    def answers_per_s(self, prompt: int, answer: int) -> float:
        """What one decode engine can do with all its places taken."""
        kv = self.max_num_seqs * (prompt + answer // 2)
        step = self.step_of(0, self.max_num_seqs, kv, 0, saves=False)
        return self.max_num_seqs / (answer * step)


#: What is measured: see above.
H200: Final = Gpu()
