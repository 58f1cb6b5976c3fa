"""Which parameters of a request are refused, and with which sentence?

vLLM takes any field and leaves out what it does not know, or cannot do with this model: the answer
is then another one than was asked for, and nobody says so.  docs/api.md has all parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

_MEDIA: Final = "images, audio, video and files do not go through the two stages: send text"
_KV: Final = "KV is named by the workers alone"
_GUIDED: Final = "vLLM has removed it: use structured_outputs, or response_format"
_FUNCTIONS: Final = "use tools and tool_choice"
_PRIORITY: Final = (
    "the engines take requests as they come: priorities need "
    '{"scheduling_policy": "priority"} in PDTASKS_ENGINE_ARGS, of workers and API'
)
_BEST_OF: Final = "nobody chooses the best here: ask for n choices, with logprobs, and choose"
_TOOLS: Final = "only tools of type function, custom or namespace: the server runs none itself"

#: Parameters that vLLM's models have. What equals nothing (null, false, 0, empty) is taken.
REFUSED: Final[Mapping[str, str]] = {
    "use_beam_search": "beam search does not go through the two stages: ask for n choices",
    "watermarking": "no watermark goes through the two stages",
    "prompt_embeds": "embeddings do not go through the two stages: send text or token ids",
    "media_io_kwargs": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "kv_transfer_params": _KV,
    "ec_transfer_params": _KV,
    "vllm_xargs": f"no extension reads it, and {_KV}",
    "routed_experts_prompt_start": "which experts a token was sent to is not told",
    "previous_input_messages": "earlier messages belong into input",
}

#: Parameters that only the routes that render a prompt, and do nothing else, know.
ONLY_RENDERED: Final[Mapping[str, str]] = {
    "return_token_offsets": "only the routes that end in /render tell offsets",
}

#: Parameters of other servers, or of other versions, that vLLM would leave out without a word.
UNKNOWN: Final[Mapping[str, str]] = {
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_decoding_backend": _GUIDED,
    "guided_whitespace_pattern": _GUIDED,
    "functions": _FUNCTIONS,
    "function_call": _FUNCTIONS,
    "modalities": "answers are text",
    "audio": "answers are text",
    "early_stopping": "beam search does not go through the two stages: ask for n choices",
    "logits_processors": "code of callers is not run",
    "lora_request": "LoRA does not go through the two stages",
    "conversation": "no conversation is kept: send the earlier messages",
}

#: Unknown to vLLM, and nothing of the answer depends on them.
WITHOUT_EFFECT: Final = frozenset(
    (
        *("metadata", "store", "service_tier", "user", "safety_identifier", "prediction"),
        # Claude Code sends it each time; the whole conversation is a right prompt as well.
        "context_management",
        *("prompt_cache_key", "prompt_cache_retention", "client_metadata", "inference_geo"),
        "stream_options",
    )
)

#: What has a sentence of its own, wherever it comes.
_NAMED: Final = frozenset((*REFUSED, *ONLY_RENDERED, *UNKNOWN, *WITHOUT_EFFECT, "best_of"))

#: Which header says what a parameter says.
_PRIORITY_HEADER: Final = b"x-vllm-priority"

#: Kinds of content, as OpenAI and Anthropic call them, that are no text.
_MEDIA_PARTS: Final = frozenset(
    (
        *("image", "image_url", "image_pil", "image_embeds", "input_image"),
        *("audio", "audio_url", "audio_embeds", "input_audio"),
        *("video", "video_url", "input_video"),
        *("document", "file", "input_file", "prompt_embeds", "vision_chunk"),
    )
)
#: Where a body has content, and a message or a tool's result has it.
_OUTER: Final = ("messages", "input", "system")
_INNER: Final = ("content", "output")
#: Lists within lists that are looked into: a conversation, its messages, results, their parts.
_DEEPEST: Final = 4

_TOOL_KINDS: Final = frozenset(("function", "custom", "namespace"))

_CHAT: Final = "/v1/chat/completions"
_PLAIN: Final = "/v1/completions"
#: Which of vLLM's models reads the body of a route.
MODELS: Final[Mapping[str, type[BaseModel]]] = {
    _CHAT: ChatCompletionRequest,
    f"{_CHAT}/batch": BatchChatCompletionRequest,
    _PLAIN: CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": AnthropicMessagesRequest,
}
#: Routes whose body is a chat if it has messages, else a completion; and what else they know.
_EITHER: Final[Mapping[str, frozenset[str]]] = {
    "/v1/jobs": frozenset(("timeout",)),
    "/invocations": frozenset(),
}
_RENDER: Final = "/render"


class Refusal(NamedTuple):
    """What is wrong with a request."""

    param: str
    message: str


class Parameters:
    """What may stand in a body."""

    def __init__(self, *, priorities: bool) -> None:
        """`priorities`: the engines schedule by them."""
        self._priorities = priorities

    def refusal(self, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Refusal | None:
        """Why the request is refused; None: it may go on, to whoever looks at its values."""
        path, is_rendered = path.removesuffix(_RENDER), path.endswith(_RENDER)
        if path not in MODELS and path not in _EITHER:
            return None
        try:
            fields = _read(body)
        except (ValueError, RecursionError):
            return None  # no JSON: the route says so
        if not isinstance(fields, dict):
            return None
        if headers.get(_PRIORITY_HEADER, b"0").strip() != b"0":
            fields["priority"] = 1  # which is what vLLM looks at first
        return self.refusal_of_fields(path, fields, is_rendered=is_rendered)

    def refusal_of_fields(
        self, path: str, fields: Mapping[str, Any], *, is_rendered: bool = False
    ) -> Refusal | None:
        """The same for a body that has been read."""
        extra = _EITHER.get(path, frozenset())
        if path in _EITHER:
            extra |= {"messages", "prompt"}  # the route says what is wrong with both
            path = _CHAT if "messages" in fields else _PLAIN
        known = _names(MODELS[path]) | extra | _NAMED
        for name, value in fields.items():
            if value is None:
                continue
            if name not in known:
                why: str | None = f"no parameter of {path}: it would be ignored"
            elif value in (0, "", [], {}):  # False equals 0
                why = None
            else:
                why = self._why_not(path, name, fields, is_rendered=is_rendered)
            if why is not None:
                return Refusal(name, f"{name}: {why}")
        for name in _OUTER:
            if _has_media(fields.get(name)):
                return Refusal(name, f"{name}: {_MEDIA}")
        return None

    def _why_not(
        self, path: str, name: str, fields: Mapping[str, Any], *, is_rendered: bool
    ) -> str | None:
        """Why a value of `name` that says something is refused."""
        if name == "priority":
            return None if self._priorities else _PRIORITY
        if name == "best_of":
            return None if fields[name] == (fields.get("n") or 1) else _BEST_OF
        if name == "tools" and path == "/v1/responses":
            return None if _are_ours(fields[name]) else _TOOLS
        if name in ONLY_RENDERED and not is_rendered:
            return ONLY_RENDERED[name]
        return REFUSED.get(name) or UNKNOWN.get(name)


def _read(body: bytes) -> Any:
    """What is in `body`, but for a prompt: it may be long, no rule is about it, its route reads it.

    Raises ValueError or RecursionError.
    """
    try:
        decode = msgspec.json.decode
        fields = decode(body, type=dict[str, msgspec.Raw])
        return {
            # (Raw bytes are not equal to bytes.)
            name: value if name == "prompt" and bytes(value) != b"null" else decode(value)
            for name, value in fields.items()
        }
    except (msgspec.MsgspecError, ValueError):
        return json.loads(body)  # it takes what others do not, NaN for one, as the route does


def _names(model: type[BaseModel]) -> frozenset[str]:
    fields = model.model_fields
    return frozenset(fields) | {f.alias for f in fields.values() if f.alias is not None}


def _are_ours(tools: Any) -> bool:
    if not isinstance(tools, list):
        return True  # the route says what is wrong with it
    kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)]
    return all(not isinstance(kind, str) or kind in _TOOL_KINDS for kind in kinds)


def _has_media(items: Any, depth: int = 0) -> bool:
    """Is anything in messages, or in their content, no text?"""
    if not isinstance(items, list) or depth > _DEEPEST:
        return False
    return any(_is_media(item, depth + 1) for item in items)


def _is_media(item: Any, depth: int) -> bool:
    if isinstance(item, list):  # several conversations
        return _has_media(item, depth)
    if not isinstance(item, dict):
        return False
    kind = item.get("type")
    return (
        (isinstance(kind, str) and kind in _MEDIA_PARTS)
        or not _MEDIA_PARTS.isdisjoint(item)
        or any(_has_media(item.get(name), depth) for name in _INNER)
    )
