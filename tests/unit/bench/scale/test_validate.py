"""Does the model meet what was measured on GPUs, as far as docs/scaling.md says?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtasks.bench.scale.validate import CASES, Case, measured, validate

RESULTS = Path(__file__).parents[4] / "bench" / "results"
SPLIT = [case for case in CASES if case.topology == "pdtasks 1P1D"]


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_prefill_and_decode_on_two_gpus_are_met(case: Case) -> None:
    (row,) = validate(RESULTS, [case])

    assert abs(row["error"]["ttft_mean_ms"]) < 0.12
    assert abs(row["error"]["e2e_mean_ms"]) < 0.1
    assert abs(row["error"]["itl_p50_ms"]) < 0.06
    assert abs(row["error"]["goodput"]) < 0.1


def test_where_engines_do_both_prompts_stop_answers_as_they_did() -> None:
    for case in (case for case in CASES if case.layout.both):
        (row,) = validate(RESULTS, [case])

        assert abs(row["error"]["itl_p99_ms"]) < 0.2
        assert abs(row["error"]["e2e_mean_ms"]) < 0.1
        assert row["modelled"]["goodput"] < 0.2


def test_a_row_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / CASES[0].file).write_text("[]")

    with pytest.raises(LookupError, match="5000/250"):
        measured(CASES[0], tmp_path)
