"""Which worker gets which core or GPU?"""

from __future__ import annotations

import pytest

from pdtasks.cluster.placement import (
    WantedWorker,
    further_worker,
    place_on_cores,
    place_on_gpus,
    ranks_per_worker,
    usable_gpus,
)
from pdtasks.errors import ConfigurationError
from pdtasks.settings import make_settings


def test_two_workers_on_two_cores_have_one_each_and_prefill_the_first() -> None:
    plan = place_on_cores(1, 1, cores=[0, 1])

    assert [w.name for w in plan.workers] == ["prefill1", "decode1"]
    assert [w.env["VLLM_CPU_OMP_THREADS_BIND"] for w in plan.workers] == ["0", "1"]
    assert [w.devices for w in plan.workers] == ["core 0", "core 1"]
    assert plan.warning is None


def test_cores_are_shared_out_evenly_and_the_rest_stays_free() -> None:
    plan = place_on_cores(1, 2, cores=list(range(8)))

    binds = [w.env["VLLM_CPU_OMP_THREADS_BIND"] for w in plan.workers]
    assert binds == ["0,1", "2,3", "4,5"]


def test_cores_that_this_process_may_not_use_are_left_out() -> None:
    plan = place_on_cores(1, 1, cores=[3, 5])

    assert [w.env["VLLM_CPU_OMP_THREADS_BIND"] for w in plan.workers] == ["3", "5"]


def test_more_workers_than_cores_share_them_with_a_warning() -> None:
    plan = place_on_cores(2, 1, cores=[0, 1])

    assert [w.env["VLLM_CPU_OMP_THREADS_BIND"] for w in plan.workers] == ["0", "1", "0"]
    assert plan.warning is not None
    assert "3 engines share 2 CPU cores" in plan.warning


def test_each_rank_of_a_parallel_cpu_engine_has_cores_of_its_own() -> None:
    plan = place_on_cores(1, 1, cores=[0, 1, 2, 3], ranks_per_worker=2)

    assert [w.env["VLLM_CPU_OMP_THREADS_BIND"] for w in plan.workers] == ["0|1", "2|3"]


def test_each_worker_has_a_gpu_of_its_own() -> None:
    plan = place_on_gpus(1, 2, gpus=["0", "1", "2", "3"])

    assert [w.name for w in plan.workers] == ["prefill1", "decode1", "decode2"]
    assert [w.env["CUDA_VISIBLE_DEVICES"] for w in plan.workers] == ["0", "1", "2"]


def test_tensor_parallel_workers_have_several_gpus() -> None:
    ranks = ranks_per_worker({"tensor_parallel_size": 2})
    plan = place_on_gpus(1, 1, gpus=["0", "1", "2", "3"], gpus_per_worker=ranks)

    assert [w.env["CUDA_VISIBLE_DEVICES"] for w in plan.workers] == ["0,1", "2,3"]


def test_more_workers_than_gpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigurationError) as refused:
        place_on_gpus(2, 2, gpus=["0", "1", "2"], gpus_per_worker=2)

    assert "2 prefill and 2 decode workers with 2 GPUs each need 8 GPUs, but 3" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [("2,5", ["2", "5"]), ("GPU-aa, GPU-bb", ["GPU-aa", "GPU-bb"]), ("", []), ("-1", [])],
)
def test_gpus_that_the_environment_chose_are_used_by_their_names(
    monkeypatch: pytest.MonkeyPatch, variable: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)

    assert usable_gpus() == gpus


FURTHER = [
    WantedWorker("both", "qwen"),
    WantedWorker("both", "qwen"),
    WantedWorker("decode", "big", 2),
]


def test_workers_of_further_models_come_last_with_names_and_queues_of_their_model() -> None:
    plan = place_on_cores(1, 1, cores=list(range(6)), further=FURTHER)

    assert [(w.name, w.queues) for w in plan.workers] == [
        ("prefill1", "prefill"),
        ("decode1", "decode"),
        ("both1.qwen", "prefill.qwen,decode.qwen"),
        ("both2.qwen", "prefill.qwen,decode.qwen"),
        ("decode1.big", "decode.big"),
    ]
    binds = [w.env["VLLM_CPU_OMP_THREADS_BIND"] for w in plan.workers]
    assert binds == ["0", "1", "2", "3", "4|5"]


def test_each_model_has_as_many_gpus_as_its_own_engine_needs() -> None:
    gpus = [str(number) for number in range(8)]

    plan = place_on_gpus(1, 1, gpus=gpus, gpus_per_worker=2, further=FURTHER)

    found = [w.env["CUDA_VISIBLE_DEVICES"] for w in plan.workers]
    assert found == ["0,1", "2,3", "4", "5", "6,7"]
    with pytest.raises(ConfigurationError, match=r"and 3 of other models .* need 8 GPUs"):
        place_on_gpus(1, 1, gpus=gpus[:7], gpus_per_worker=2, further=FURTHER)


def test_a_further_worker_is_said_by_its_queues() -> None:
    settings = make_settings(
        models={"qwen": "org/qwen", "big": {"engine_args": {"tensor_parallel_size": 2}}}
    )

    assert further_worker("decode.qwen,prefill.qwen", settings) == WantedWorker("both", "qwen")
    assert further_worker("decode.big", settings) == WantedWorker("decode", "big", 2)
    for wrong in ("prefill", "prefill.qwen,decode.big", "prefill.qwen,decode", "qwen", "tune.qwen"):
        with pytest.raises(ConfigurationError, match="--worker"):
            further_worker(wrong, settings)
    with pytest.raises(ConfigurationError, match="PDTASKS_MODELS has no model 'gpt'"):
        further_worker("prefill.gpt", settings)
