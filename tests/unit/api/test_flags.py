"""Which of vLLM's flags may one give to `pdtasks up` and `pdtasks api`?"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from api.flags import check_flags, check_reasoning_parser, front_end_arguments
from pdtasks.cli import main
from pdtasks.errors import ConfigurationError


def test_flags_of_the_front_end_reach_vllm() -> None:
    flags = "--enable-auto-tool-choice --tool-call-parser hermes --response-role 'my role'"
    check_flags(flags)

    arguments = front_end_arguments(flags, "a/model")

    assert arguments.enable_auto_tool_choice
    assert arguments.tool_call_parser == "hermes"
    assert arguments.response_role == "my role"
    assert arguments.model == "a/model"
    assert arguments.enable_prompt_tokens_details


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--enable-auto-tool-choice", "requires --tool-call-parser"),
        ("--tool-call-parser nobody", "hermes"),
        ("--block-size 16", "PDTASKS_ENGINE_ARGS"),
        ("--api-key x", "VLLM_API_KEY"),
        ("--ssl-keyfile x", "proxy"),
        ("--port 1", "--port of pdtasks"),
        ("--prefil 2", "unrecognized arguments: --prefil"),
        ("--response-role", "expected one argument"),
        ("stray", "a word without a flag"),
        ("--chat-template ./not-there.jinja", "not-there.jinja"),
        ("'", "cannot be read"),
    ],
)
def test_any_other_is_refused_with_what_to_do(flags: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_flags(flags)

    assert words in str(refused.value)


def test_an_unknown_reasoning_parser_is_refused_with_those_there_are() -> None:
    check_reasoning_parser("deepseek_r1")

    with pytest.raises(ConfigurationError, match="deepseek_r1"):
        check_reasoning_parser("nobody")


def test_up_says_it_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDTASKS_HOME", str(tmp_path / "home"))
    done = CliRunner().invoke(main, ["up", "--tool-call-parser", "nobody"])

    assert done.exit_code == 1
    assert "pdtasks: --tool-call-parser is one of" in done.stderr
    assert not (tmp_path / "home").exists()
