"""What do the benches of a running stack find?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pdtasks.cli import main
from tests.acceptance.running_stack import Stack


@pytest.fixture
def bench(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[CliRunner, list[str]]:
    """A command line that knows the stack by its home alone, and options for the figures."""
    monkeypatch.setenv("PDTASKS_HOME", str(stack.home))
    return CliRunner(), ["--json", str(tmp_path / "found.json")]


def test_the_gap_is_measured_beside_a_normal_one(
    bench: tuple[CliRunner, list[str]], tmp_path: Path
) -> None:
    runner, json_file = bench
    done = runner.invoke(main, ["bench", "gap", "--tokens", "40", "--requests", "2", *json_file])
    assert done.exit_code == 0, done.output

    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["prompt_tokens"] == 40
    # (Which is longer, two requests beside other work do not tell.)
    assert row["itl_ms"] > 0
    assert 0 < row["gap_ms"] <= row["worst_gap_ms"]
    assert row["recomputed_blocks"] == 0


def test_both_ways_of_a_prompt_are_measured_beside_other_answers(
    bench: tuple[CliRunner, list[str]], tmp_path: Path
) -> None:
    runner, json_file = bench
    options = ["--tokens", "40", "--requests", "1", "--others", "1", *json_file]
    done = runner.invoke(main, ["bench", "route", *options])
    assert done.exit_code == 0, done.output

    split, whole = json.loads((tmp_path / "found.json").read_text())
    assert (split["route"], whole["route"]) == ("split", "whole")
    for row in (split, whole):
        assert 0 < row["ttft_ms"] < row["e2e_ms"]
        assert 0 < row["others_itl_ms"] <= row["others_longest_ms"]


def test_a_change_of_roles_is_measured_while_requests_come(
    bench: tuple[CliRunner, list[str]], tmp_path: Path
) -> None:
    runner, json_file = bench
    options = ["--rate", "2", "--prompt", "40", "--answer", "6", "--hold", "3", *json_file]
    done = runner.invoke(main, ["bench", "role", "decode1", "both", "decode", *options])
    assert done.exit_code == 0, done.output

    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["role"] for one in (found["before"], *found["changes"])] == [
        *("decode", "both", "decode")
    ]
    for one in found["changes"]:
        assert one["requests"] > 0
        assert one["failed"] == 0
        assert one["serves_ms"] > 0
        assert one["worst_gap_ms"] > 0


def test_many_answers_to_a_prompt_are_measured_beside_many_prompts(
    bench: tuple[CliRunner, list[str]], tmp_path: Path
) -> None:
    runner, json_file = bench
    options = ["--answers", "3", "--tokens", "300", "--rounds", "1"]
    done = runner.invoke(main, ["bench", "answers", *options, *json_file])
    assert done.exit_code == 0, done.output

    one, siblings, apart = json.loads((tmp_path / "found.json").read_text())
    assert one["computed_tokens"] == 300
    assert apart["computed_tokens"] == 3 * 300
    # Behind the first two whole blocks each computes its own end.
    assert siblings["computed_tokens"] < 2 * 300
    assert siblings["way"] in done.output


def test_answers_alone_are_compared_with_those_in_company(
    bench: tuple[CliRunner, list[str]], tmp_path: Path
) -> None:
    runner, json_file = bench
    options = ["--prompts", "3", "--tokens", "40", "--answer", "4"]
    done = runner.invoke(main, ["bench", "exact", *options, *json_file])
    assert done.exit_code == 0, done.output

    again, together = json.loads((tmp_path / "found.json").read_text())
    # Alone an answer is the same to the last bit
    assert again["same_tokens"] == again["same_bits"] == again["answers"] == 3
    assert again["largest_difference"] == 0
    assert 0 <= together["same_bits"] <= together["same_tokens"] <= 3
    assert together["way"] in done.output
