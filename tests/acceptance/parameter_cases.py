"""Requests by whose answers docs/api.md shows what each parameter does.

Each is answered by the stack and by vLLM's own app over one engine: the answers have to be equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

CHAT: Final = "/v1/chat/completions"
PLAIN: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"

#: Flags of the API, by name. What a model does not say by itself is had by a grammar, which needs
#: engines that do not know the reasoning parser.
FLAGS: Final = {
    "tools": "--enable-auto-tool-choice --tool-call-parser hermes",
    "reasoning": (
        "--enable-auto-tool-choice --tool-call-parser hermes --trust-request-chat-template"
    ),
}
#: Of all engines.
ENGINE_ARGS: Final = {
    # Budgets need it, and count from the first to the second.
    "reasoning_config": {"reasoning_start_str": " think", "reasoning_end_str": " done."},
    # With half as many digits the company of a step tips close choices, on some CPUs.
    "dtype": "float32",
}
#: Requests.
_AT_ONCE: Final = 8
#: With which reasoning parser.
REASONING: Final = {"reasoning": "granite"}


@dataclass(frozen=True)
class Case:
    """One request."""

    path: str
    fields: dict[str, Any]
    status: int = 200
    flags: str = "tools"

    def body(self, model: str) -> dict[str, Any]:
        """What is sent: greedy and short unless the case says otherwise."""
        short: dict[str, Any] = {"max_tokens": 4}
        if self.path == RESPONSES:
            short = {"max_output_tokens": 4}
        elif "max_completion_tokens" in self.fields:
            short = {}
        return {"model": model, "temperature": 0} | short | self.fields

    @property
    def is_alone(self) -> bool:
        """Is it asked when nobody else is? The last bits of a logprob depend on the company."""
        return any("logprob" in name for name in self.fields)

    def shares_prompt(self, other: Case) -> bool:
        """Does this request find the other one's prompt in a cache?"""
        prompts = ("prompt", "messages", "input")
        return all(self.fields.get(name) == other.fields.get(name) for name in prompts)


def in_company(cases: Mapping[str, Case]) -> list[list[str]]:
    """The names of `cases`, in order; those of a group are asked at once.

    A step of several requests takes a CPU hardly longer than a step of one.
    """
    groups: list[list[str]] = []
    for name, case in cases.items():
        last = groups[-1] if groups else []
        company = [cases[other] for other in last]
        if (
            0 < len(last) < _AT_ONCE
            and not case.is_alone
            and not company[0].is_alone
            and company[0].flags == case.flags
            # Else whose prompt is found in the cache is left to chance.
            and not any(case.shares_prompt(other) for other in company)
        ):
            last.append(name)
        else:
            groups.append([name])
    return groups


def plain(prompt: Any, status: int = 200, **fields: Any) -> Case:
    return Case(PLAIN, {"prompt": prompt, **fields}, status)


def chat(*said: str, status: int = 200, flags: str = "tools", **fields: Any) -> Case:
    return Case(CHAT, {"messages": _messages(said), **fields}, status, flags)


def respond(asked: Any, status: int = 200, flags: str = "tools", **fields: Any) -> Case:
    return Case(RESPONSES, {"input": asked, **fields}, status, flags)


def message(*said: str, status: int = 200, flags: str = "tools", **fields: Any) -> Case:
    return Case(MESSAGES, {"messages": _messages(said), **fields}, status, flags)


def _messages(said: tuple[str, ...]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]


STREAM: Final[dict[str, Any]] = {"stream": True, "stream_options": {"include_usage": True}}
SEEDED: Final[dict[str, Any]] = {"temperature": 1.0, "seed": 7}
SAMPLING: Final[dict[str, Any]] = {
    "temperature": 1.2,
    "seed": 11,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.02,
}
PENALTIES: Final[dict[str, Any]] = {
    "frequency_penalty": 0.8,
    "presence_penalty": 0.7,
    "repetition_penalty": 1.1,
}
SCHEMA: Final = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
LONG: Final = "Write a list of words about the sea. " * 16  # more than a block, less than two
WEATHER: Final = {"type": "object", "properties": {"dry": {"type": "boolean"}}, "required": ["dry"]}
FUNCTION: Final = {"name": "weather", "description": "The weather.", "parameters": WEATHER}
TOOL: Final = {"type": "function", "function": FUNCTION}
CALLED: Final = r'<tool_call>\n\{"name": "weather", "arguments": \{"dry": true\}\}\n</tool_call>'
THOUGHT: Final = "Here is my thought process:[a-c] Here is my response:[d-f]"
THINKS: Final[dict[str, Any]] = {
    "flags": "reasoning",
    "max_tokens": 30,
    "structured_outputs": {"regex": THOUGHT},
}

CASES: Final[dict[str, Case]] = {
    # -- completions -----------------------------------------------------------------------------
    "a text": plain("The capital of France is"),
    "a stream": plain("The capital of Spain is", **STREAM),
    "usage in each chunk": plain(
        "The capital of Japan is",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        stream_interval=3,
    ),
    "token ids": plain([504, 3575, 282, 4649, 314], return_token_ids=True),
    "token ids streamed": plain([504, 3575, 282, 4649, 314], return_token_ids=True, **STREAM),
    "several texts": plain(["The sea is", "The sky is"], n=2, **SEEDED),
    "several lists of token ids": plain([[504, 3575], [504, 4649, 314]], return_token_ids=True),
    "n with seeds": plain("A boat is", n=3, logprobs=1, **SEEDED),
    "n streamed": plain("A ship is", n=2, **SEEDED, **STREAM),
    "n of which the best is not chosen": plain("A raft is", n=2, best_of=2, **SEEDED),
    "sampling": plain("Once upon a time", **SAMPLING),
    "penalties": plain("Again and again and", **PENALTIES),
    "logprobs": plain("One two three", logprobs=3),
    "logprobs of the sampled": plain("One two six", logprobs=0),
    "logprobs as ids": plain("One two five", logprobs=2, return_tokens_as_token_ids=True),
    "logprobs of some tokens": plain("One two four", logprobs=1, logprob_token_ids=[28, 30]),
    "more logprobs than there are": plain("One", logprobs=99, status=400),
    "prompt logprobs": plain("Grass is green and", prompt_logprobs=2, return_token_ids=True),
    "a long prompt": plain(LONG),
    "a long prompt again": plain(LONG),
    "prompt logprobs of a prompt that is cached": plain(LONG, prompt_logprobs=1, max_tokens=2),
    "echo": plain("Roses are red,", echo=True, logprobs=1),
    "echo alone": plain("Violets are blue,", echo=True, max_tokens=0),
    "echo streamed": plain("Sugar is sweet,", echo=True, **STREAM),
    "a stop string": plain("One, two, three, four, five,", stop=[" seven"], max_tokens=12),
    "a stop string that is told": plain(
        "One, two, three, four, six,", stop=",", include_stop_str_in_output=True
    ),
    "a stop token": plain("One, two, three, four, seven,", stop_token_ids=[28, 30]),
    "logit bias": plain("The capital of Italy is", logit_bias={"3575": 100.0}),
    "allowed tokens": plain("The capital of Egypt is", allowed_token_ids=[28, 30, 504, 3575]),
    "bad words": plain("The capital of Greece is", bad_words=[" Athens"]),
    "min tokens": plain("The end", min_tokens=3, stop_token_ids=[30, 28, 29], logit_bias={"30": 9}),
    "eos ignored": plain(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHi.",
        ignore_eos=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        add_special_tokens=False,
    ),
    "a truncated prompt": plain(
        "The capital of Norway is Oslo. The capital of Russia is",
        truncate_prompt_tokens=5,
        truncation_side="left",
        return_token_ids=True,
    ),
    "a schema": plain("A number:", structured_outputs={"json": SCHEMA}, max_tokens=12),
    "a schema by response format": plain(
        "A digit:",
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        max_tokens=12,
    ),
    "a regex": plain("A code:", structured_outputs={"regex": "[a-c]{4}-[0-9]{2}"}, max_tokens=12),
    "a choice": plain("Yes or no?", structured_outputs={"choice": ["yes", "no", "perhaps"]}),
    "a grammar": plain(
        "A sum:",
        structured_outputs={"grammar": 'root ::= term "+" term\nterm ::= [1-9]'},
        **STREAM,
    ),
    "a structural tag": plain(
        "A tag:",
        structured_outputs={
            "structural_tag": json.dumps(
                {"type": "structural_tag", "format": {"type": "regex", "pattern": "[a-c]{5}"}}
            )
        },
    ),
    "any JSON": plain("JSON:", structured_outputs={"json_object": True}, max_tokens=8, **SEEDED),
    "repetition": plain(
        "ha ha ha ha ha ha ha ha",
        repetition_detection={"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3},
        max_tokens=16,
    ),
    "a salt": plain("Salt and", cache_salt="mine"),
    "an empty salt": plain("Salt and", cache_salt="", status=400),
    "an id": plain("My name is", request_id="test-parameters", session_id="s", user="u"),
    "a penalty for length": plain("As long as", length_penalty=2.0),
    "render's parameters": plain("To render", mm_payload="none", return_mm_kwargs=False),
    "a suffix": plain("def f(", suffix="return 1", status=400),
    "a budget": plain("Let me think", thinking_token_budget=3, max_tokens=8),
    "a budget that is spent": plain("I think", thinking_token_budget=0),
    # -- chat ------------------------------------------------------------------------------------
    "a chat": chat("What is the capital of France?", max_completion_tokens=8),
    "a chat of several turns": chat("Hi", "Hello.", "Who are you?"),
    "a chat streamed": chat("What is the capital of Spain?", **STREAM),
    "a chat sampled": chat("Say something.", n=2, **SAMPLING, **PENALTIES),
    "a chat's logprobs": chat("Count.", logprobs=True, top_logprobs=2, prompt_logprobs=1),
    "a chat's logprobs as ids": chat(
        "Count on.",
        logprobs=True,
        logprob_token_ids=[28, 30],
        return_tokens_as_token_ids=True,
        return_token_ids=True,
        return_prompt_text=True,
    ),
    "a chat that stops": chat(
        "Count from one to ten.",
        stop=["e"],
        include_stop_str_in_output=True,
        max_tokens=12,
        stream_interval=2,
        **STREAM,
    ),
    "a chat with other tokens": chat(
        "Which city?",
        logit_bias={"3575": 5.0},
        bad_words=["The"],
        stop_token_ids=[30],
        min_tokens=4,
    ),
    "a chat with few tokens": chat("Which?", allowed_token_ids=[28, 30, 504], ignore_eos=True),
    "a chat's special tokens": chat(
        "Say hi.",
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        ignore_eos=True,
        add_special_tokens=True,
        logit_bias={"2": 100.0},
    ),
    "a chat that is cut": chat(
        LONG, truncate_prompt_tokens=20, truncation_side="right", return_token_ids=True
    ),
    "a chat that is continued": chat(
        "What is the capital of Italy?",
        "The capital of Italy is",
        continue_final_message=True,
        add_generation_prompt=False,
        echo=True,
    ),
    "a chat's template": chat(
        "Hello?",
        chat_template_kwargs={"unknown": 1},
        documents=[{"title": "t", "text": "x"}],
        reasoning_effort="low",
        return_prompt_text=True,
    ),
    "a template of one's own": chat("Hello?", chat_template="{{ 1 }}", status=400),
    "a template of one's own that is trusted": chat(
        "Hello!", chat_template="Question: {{ messages[0].content }}\nAnswer:", flags="reasoning"
    ),
    "a chat's schema": chat(
        "A number.",
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        max_tokens=12,
    ),
    "a chat's JSON": chat("JSON.", response_format={"type": "json_object"}, max_tokens=8, **SEEDED),
    "a chat's choice": chat("Yes?", structured_outputs={"choice": ["yes", "no"]}),
    "a chat's repetition": chat(
        "Say ha.",
        logit_bias={"28": 100.0},
        repetition_detection={"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 3},
        max_tokens=16,
    ),
    "a chat's names": chat(
        "Who?", request_id="test-chat", session_id="s", user="u", cache_salt="mine"
    ),
    "a chat's parameters without effect": chat(
        "What?", length_penalty=2.0, mm_payload="none", return_mm_kwargs=False, metadata={"a": "b"}
    ),
    "a chat's budget": chat("Let me think", thinking_token_budget=8, max_tokens=8),
    "tools, auto": chat(
        "The weather?",
        tools=[TOOL],
        structured_outputs={"regex": CALLED},
        max_tokens=40,
        parallel_tool_calls=False,
    ),
    "tools, none": chat("The weather today?", tools=[TOOL], tool_choice="none"),
    "tools, required, streamed": chat(
        "The weather there?", tools=[TOOL], tool_choice="required", max_tokens=40, **STREAM
    ),
    "tools, named": chat(
        "The weather?",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=20,
    ),
    "tools, named, that are not there": chat(
        "The weather?",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "other"}},
        status=400,
    ),
    "reasoning": chat("Why?", **THINKS),
    "reasoning streamed": chat("Why not?", **THINKS, **STREAM),
    "reasoning left out": chat("Why so?", include_reasoning=False, **THINKS),
    # -- responses -------------------------------------------------------------------------------
    "a response": respond("What is the capital of France?", instructions="Be short."),
    "a response streamed": respond("What is the capital of Spain?", stream=True),
    "a response to messages": respond(_messages(("Hi", "Hello.", "Who are you?"))),
    "a response sampled": respond("Say something.", **SAMPLING, **PENALTIES),
    "a response's logprobs": respond(
        "Count.", include=["message.output_text.logprobs"], top_logprobs=2
    ),
    "a response that stops": respond(
        "Count from one to ten.",
        stop=["e"],
        include_stop_str_in_output=True,
        max_output_tokens=12,
    ),
    "a response with other tokens": respond(
        "Which city?", logit_bias={"3575": 5.0}, stop_token_ids=[30]
    ),
    "a response's special tokens": respond(
        "Say hi.", skip_special_tokens=False, ignore_eos=True, logit_bias={"2": 100.0}
    ),
    "a response that may be cut": respond("Cut?", truncation="auto"),
    "a response that is too long": respond(LONG * 20, truncation="disabled", status=400),
    "a response's schema": respond(
        "A number.",
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        max_output_tokens=12,
    ),
    "a response's choice": respond("Yes?", structured_outputs={"choice": ["yes", "no"]}),
    "a response's tools": respond(
        "The weather?",
        tools=[{"type": "function", **FUNCTION}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=40,
    ),
    "a response's reasoning": respond(
        "Why?",
        reasoning={"effort": "low"},
        structured_outputs={"regex": THOUGHT},
        max_output_tokens=30,
        flags="reasoning",
    ),
    "a response's reasoning left out": respond(
        "Why so?",
        include_reasoning=False,
        structured_outputs={"regex": THOUGHT},
        max_output_tokens=30,
        flags="reasoning",
    ),
    "a response's messages": respond(
        "Hello?", enable_response_messages=True, chat_template_kwargs={"unknown": 1}
    ),
    "a response's names": respond(
        "Who?", request_id="resp_test", session_id="s", user="u", cache_salt="mine"
    ),
    "a response's parameters without effect": respond(
        "What?",
        metadata={"a": "b"},
        service_tier="flex",
        store=True,
        prompt_cache_key="k",
        max_tool_calls=3,
        mm_payload="none",
        return_mm_kwargs=False,
    ),
    "a response after another": respond("And?", previous_response_id="resp_none", status=404),
    "a response's prompt": respond("And?", prompt={"id": "p"}, status=400),
    # -- messages --------------------------------------------------------------------------------
    "a message": message("What is the capital of France?", system="Be short."),
    "a message streamed": message("What is the capital of Spain?", stream=True),
    "a message sampled": message("Say something.", temperature=0.1, top_k=1, top_p=0.9),
    "a message that stops": message(
        "Count from one to ten.", stop_sequences=["e"], max_tokens=12, chat_template_kwargs={"u": 1}
    ),
    "a message's schema": message(
        "A number.",
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        max_tokens=12,
    ),
    "a message's tools": message(
        "The weather?",
        tools=[{"name": "weather", "input_schema": WEATHER}],
        tool_choice={"type": "any"},
        max_tokens=40,
        stream=True,
    ),
    "a message without thinking": message("Why?", thinking={"type": "disabled"}),
    "a message with a budget": message(
        "Why?",
        thinking={"type": "enabled", "budget_tokens": 1024},
        max_tokens=1030,
        stop_sequences=["a", "e", "i", "o"],
    ),
    "a message's names": message("Who?", metadata={"user_id": "u"}, cache_salt="mine"),
    "a message's parameters without effect": message(
        "What?", mm_payload="none", return_mm_kwargs=False
    ),
}
