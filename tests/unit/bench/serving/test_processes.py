"""Are engines and pdtasks told the same things, each in its own way?"""

from __future__ import annotations

import json

from pdtasks.bench.serving.processes import flags_of, settings_of

ARGUMENTS = {
    "max_model_len": 8192,
    "max_num_seqs": 128,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "compilation_config": {"level": 3},
}


def test_a_vllm_server_gets_flags() -> None:
    assert flags_of(ARGUMENTS) == [
        *("--max-model-len", "8192", "--max-num-seqs", "128"),
        *("--no-enable-prefix-caching", "--enforce-eager"),
        *("--compilation-config", '{"level": 3}'),
    ]


def test_pdtasks_gets_settings_and_the_rest_as_engine_arguments() -> None:
    found = settings_of(ARGUMENTS)

    assert found["PDTASKS_MAX_MODEL_LEN"] == "8192"
    assert found["PDTASKS_MAX_NUM_SEQS"] == "128"
    assert json.loads(found["PDTASKS_ENGINE_ARGS"]) == {
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "compilation_config": {"level": 3},
    }
