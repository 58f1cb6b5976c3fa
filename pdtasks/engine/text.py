"""From text to tokens and back, for callers that bring no tokenizer (`pipeline.submit`).

The API process tokenises and detokenises itself, with vLLM's own front half.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.renderers.params import ChatParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.input_processor import InputProcessor

from pdtasks.engine.detokenise import begin_behind_prompt
from pdtasks.engine.grammar import require_possible
from pdtasks.errors import InvalidRequest
from pdtasks.messages import TextRequest


class TextFrontend:
    """Makes engine requests of text, and text of tokens."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._renderer = renderer_from_config(config)
        self._inputs = InputProcessor(config, self._renderer)

    async def prepare(self, request_id: str, text: TextRequest) -> EngineCoreRequest:
        """Tokenise and validate `text`. Raises InvalidRequest saying what is wrong."""
        try:
            prompt = await self._render(text)
            if text.cache_salt is not None:
                prompt["cache_salt"] = text.cache_salt
            # No limit unless the caller sets one: the answer ends where the model ends it.
            sampling = SamplingParams(**{"max_tokens": None, **text.sampling})
            _require_one_plain_answer(sampling)
            require_possible(sampling)
            return self._inputs.process_inputs(
                request_id, prompt, sampling, supported_tasks=("generate",)
            )
        except (VLLMClientError, ValueError, TypeError) as exc:
            raise InvalidRequest(str(exc)) from exc
        except (AttributeError, KeyError) as exc:
            raise InvalidRequest(f"malformed messages or sampling fields: {exc!r}") from exc

    async def _render(self, text: TextRequest) -> Any:
        if text.messages is not None:
            _, (prompt,) = await self._renderer.render_chat_async(
                [list(text.messages)],
                ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False}),
            )
            return prompt
        raw: Any = text.prompt
        if text.prompt_token_ids is not None:
            raw = {"prompt_token_ids": list(text.prompt_token_ids)}
        (prompt,) = await self._renderer.render_cmpl_async(
            [parse_model_prompt(self._config.model_config, raw)]
        )
        return prompt

    def detokeniser(self, request: EngineCoreRequest) -> IncrementalDetokenizer:
        """Collects the answer to `request` as text and finds its stop strings."""
        detokenizer = IncrementalDetokenizer.from_new_request(self._renderer.tokenizer, request)
        begin_behind_prompt(detokenizer, request)
        return detokenizer


def _require_one_plain_answer(sampling: SamplingParams) -> None:
    unsupported = {
        "n": sampling.n != 1,
        "logprobs": sampling.logprobs is not None,
        "prompt_logprobs": sampling.prompt_logprobs is not None,
    }
    named = [name for name, is_set in unsupported.items() if is_set]
    if named:
        raise ValueError(f"a result holds one answer without {', '.join(named)}: use the HTTP API")
