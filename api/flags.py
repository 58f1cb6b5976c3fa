"""Which of vLLM's own flags does the API take? Those of its front end: templates, tools, headers.

What belongs to the engine concerns workers too (`PDTASKS_ENGINE_ARGS`), what belongs to the server
is ours.
"""

from __future__ import annotations

import argparse
import shlex
from argparse import Namespace
from dataclasses import fields
from typing import Final, NoReturn

from vllm.entrypoints.launchers.cli_args import (
    FrontendArgs,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.exceptions import VLLMClientError
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pdtasks.errors import ConfigurationError

#: Flags of vLLM's front end that pdtasks does not take, and what to do instead.
_REFUSED: Final = {
    "host": "use --host of pdtasks",
    "port": "use --port of pdtasks",
    "uds": "pdtasks listens on a host and port",
    "api_key": "everybody on the host can read a command line: set VLLM_API_KEY",
    "enable_log_outputs": "answers are in no log",
    "lora_modules": "LoRA does not go through the two stages",
    **dict.fromkeys(
        (
            *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "enable_ssl_refresh"),
            *("ssl_cert_reqs", "ssl_ciphers"),
        ),
        "let a proxy in front do TLS",
    ),
    **dict.fromkeys(
        (
            *("grpc_port", "data_parallel_supervisor_port", "dp_supervisor_probe_interval_s"),
            *("dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold"),
            *("uvicorn_log_level", "disable_uvicorn_access_log"),
            *("disable_access_log_for_endpoints", "tokens_only", "enable_scale_out"),
        ),
        "pdtasks starts its server itself",
    ),
}


class _Parser(FlexibleArgumentParser):
    """Raises instead of printing some hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"a flag for vLLM's front end cannot be used: {message}")


def front_end_arguments(flags: str, model: str) -> Namespace:
    """vLLM's arguments for serving `model` with `flags`, written as on a command line.

    Raises ConfigurationError naming the flag that cannot be used.
    """
    words = _words(flags)
    parser = make_arg_parser(_Parser(allow_abbrev=False))  # type: ignore[no-untyped-call]
    # Usage says how many of the prompt's tokens did not have to be computed.
    always = ["--model", model, "--enable-prompt-tokens-details"]
    arguments: Namespace = parser.parse_args([*always, *words])
    return arguments


def check_flags(flags: str) -> None:
    """Raises ConfigurationError when the API would not start with `flags`."""
    words = _words(flags)
    parser = make_arg_parser(_Parser(allow_abbrev=False))  # type: ignore[no-untyped-call]
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        action.default = argparse.SUPPRESS
    known = {field.name for field in fields(FrontendArgs)}
    for name in vars(parser.parse_args(words)):
        flag = f"--{name.replace('_', '-')}"
        if name in _REFUSED:
            raise ConfigurationError(f"{flag} is not taken: {_REFUSED[name]}")
        if name == "model_tag":
            raise ConfigurationError("a word without a flag is not understood: see --help")
        if name not in known:
            raise ConfigurationError(
                f"{flag} belongs to the engine, which workers and API have to agree on: set it in "
                f"PDTASKS_ENGINE_ARGS, as JSON"
            )
    arguments = front_end_arguments(flags, "model")
    try:
        if arguments.tool_parser_plugin:
            ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError, VLLMClientError) as exc:
        raise ConfigurationError(str(exc).removeprefix("Error: ")) from exc
    parsers = ToolParserManager.list_registered()
    if arguments.tool_call_parser not in (None, *parsers):
        raise ConfigurationError(f"--tool-call-parser is one of {', '.join(sorted(parsers))}")


def check_reasoning_parser(name: str) -> None:
    """Raises ConfigurationError when vLLM has no reasoning parser of this name."""
    parsers = ReasoningParserManager.list_registered()
    if name not in parsers:
        raise ConfigurationError(f"--reasoning-parser is one of {', '.join(sorted(parsers))}")


def _words(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as exc:
        raise ConfigurationError(f"PDTASKS_API_ARGS cannot be read: {exc}") from exc
