"""Which options are there, and where do they come from?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtasks.cluster.stack import write_stack
from pdtasks.errors import ConfigurationError
from pdtasks.naming import DECODE, MODEL_NAME, PREFILL
from pdtasks.running_stack import Stack, identify
from pdtasks.settings import Settings, load_settings, make_settings

URLS: dict[str, Any] = {
    "broker_url": "amqp://pdtasks:hush-broker@127.0.0.1:5672/pdtasks",
    "broker_api_url": "http://pdtasks:hush-api@127.0.0.1:15672/api/",
    "bus_url": "valkey://:hush-bus@127.0.0.1:6379/0",
    "bus_urls": ("valkey://:hush-bus2@127.0.0.1:6381/0", "unix://:hush-bus3@/run/bus.sock?db=0"),
    "kv_urls": ("unix://:hush-kv@/run/kv.sock?db=0", "valkey://:hush-kv2@127.0.0.1:6380/0"),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [n for n in os.environ if n.startswith("PDTASKS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_settings.cache_clear()
    yield
    load_settings.cache_clear()


@pytest.fixture
def running_stack(tmp_path: Path) -> Callable[..., Path]:
    """Leaves the file of a stack that runs on this host."""

    def write(home: Path = tmp_path / "state" / "pdtasks", **env: str) -> Path:
        home.mkdir(parents=True, exist_ok=True)
        own = identify(os.getpid())
        assert own is not None
        write_stack(home, Stack(own.pid, own.started, env=env))
        return home

    return write


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    settings = Settings()

    assert settings.home == tmp_path / "state" / "pdtasks"
    assert settings.cache_dir == tmp_path / "cache" / "pdtasks"
    assert settings.broker_url is None
    assert settings.kv_urls == ()
    assert settings.api_host == "127.0.0.1"


def test_the_running_stack_comes_before_the_defaults(running_stack: Callable[..., Path]) -> None:
    running_stack(
        PDTASKS_BUS_URL="valkey://stack",
        PDTASKS_KV_URLS="unix://a,unix://b",
        PDTASKS_API_PORT="8001",
    )

    settings = Settings()

    assert settings.bus_url == "valkey://stack"
    assert settings.kv_urls == ("unix://a", "unix://b")
    assert settings.api_port == 8001


def test_the_environment_comes_before_the_running_stack(
    running_stack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    running_stack(PDTASKS_BUS_URL="valkey://stack", PDTASKS_BROKER_URL="amqp://stack")
    monkeypatch.setenv("PDTASKS_BUS_URL", "valkey://environment")

    settings = Settings()

    assert settings.bus_url == "valkey://environment"
    assert settings.broker_url == "amqp://stack"


def test_arguments_come_before_everything(
    running_stack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    running_stack(PDTASKS_BUS_URL="valkey://stack")
    monkeypatch.setenv("PDTASKS_BUS_URL", "valkey://environment")

    assert Settings(bus_url="valkey://argument").bus_url == "valkey://argument"


def test_a_home_from_the_environment_is_where_the_stack_is_looked_for(
    running_stack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running_stack(PDTASKS_BUS_URL="valkey://default-home")
    elsewhere = running_stack(
        tmp_path / "elsewhere", PDTASKS_BUS_URL="valkey://elsewhere", PDTASKS_HOME="/nowhere"
    )
    monkeypatch.setenv("PDTASKS_HOME", str(elsewhere))

    settings = Settings()

    assert settings.bus_url == "valkey://elsewhere"
    assert settings.home == elsewhere, "a stack does not say where its own file lies"


@pytest.mark.parametrize("change", [{"version": 99}, {"pid_started": 1}, {"pid": 2**22 + 1}])
def test_a_stack_that_is_gone_or_of_another_release_says_nothing(
    running_stack: Callable[..., Path], change: dict[str, Any]
) -> None:
    home = running_stack(PDTASKS_BUS_URL="valkey://gone")
    assert Settings().bus_url == "valkey://gone"
    file = home / "stack.json"

    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    assert Settings().bus_url is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", "{}", '{"env": null}', '{"env": 7}', '{"env": ["a"]}']
)
def test_a_stack_file_that_says_nothing_is_ignored(tmp_path: Path, text: str) -> None:
    home = tmp_path / "state" / "pdtasks"
    home.mkdir(parents=True)
    (home / "stack.json").write_text(text)

    assert Settings().bus_url is None


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kv_urls": st.lists(st.text("abc:/@.", min_size=1), max_size=3).map(tuple),
            "model": st.text("abc/-_ ", min_size=1),
            "max_model_len": st.integers(2, 1 << 20),
            "request_timeout_s": st.floats(0.1, 1e6),
            "engine_args": st.dictionaries(
                st.text(min_size=1), st.one_of(st.booleans(), st.integers(), st.text())
            ),
            "device": st.sampled_from(["cpu", "cuda"]),
            "models": st.dictionaries(
                st.from_regex(rf"\A{MODEL_NAME}\Z"),
                st.text("abc/-_", min_size=1)
                | st.fixed_dictionaries(
                    {"model": st.text("abc/-_", min_size=1)},
                    optional={
                        "max_model_len": st.integers(2, 1 << 20),
                        "engine_args": st.dictionaries(st.text(min_size=1), st.integers()),
                        "api_args": st.text("abc -"),
                    },
                ),
                max_size=3,
            ),
            "served_model_name": st.just("the default one"),
        },
    )
)
def test_a_child_process_reads_the_same_settings(fields: dict[str, Any]) -> None:
    settings = Settings(**URLS | fields)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.to_env().items():
            patch.setenv(name, value)
        read = Settings()

    assert read == settings


def test_a_stack_file_of_our_own_variables_reads_as_the_same_settings(
    running_stack: Callable[..., Path],
) -> None:
    settings = Settings(**URLS, engine_args={"block_size": 32}, max_model_len=512)

    running_stack(**settings.to_env())

    assert Settings() == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_PORT", "70000"),
        ("MAX_NUM_SEQS", "0"),
        ("REQUEST_TIMEOUT_S", "soon"),
        ("ENGINE_ARGS", "{"),
        ("DEVICE", "abacus"),
        ("MODELS", "{"),
        ("MODELS", '["qwen"]'),
        ("MODELS", '{"a queue": "/models/qwen"}'),
        ("MODELS", '{"all.#": "/models/qwen"}'),
        ("MODELS", '{"qwen": {"model": "/models/qwen", "spelt_wrongly": 1}}'),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PDTASKS_{name}", value)

    with pytest.raises(ConfigurationError, match=name):
        load_settings()


def test_a_missing_service_says_how_to_name_it() -> None:
    settings = Settings()

    with pytest.raises(ConfigurationError, match="PDTASKS_BROKER_URL"):
        settings.require_broker()
    with pytest.raises(ConfigurationError, match="PDTASKS_BUS_URL"):
        settings.require_bus()


def test_settings_never_show_a_password() -> None:
    settings = Settings(**URLS)

    assert set(URLS) == {"broker_url", "broker_api_url", "bus_url", "bus_urls", "kv_urls"}
    assert "hush" not in f"{settings!r} {settings}"


def test_further_buses_have_names_in_the_order_of_their_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PDTASKS_BUS_URLS", "valkey://two:1/0, valkeys://three:1/0,")

    assert load_settings().further_buses == {
        "bus2": "valkey://two:1/0",
        "bus3": "valkeys://three:1/0",
    }
    assert Settings(bus_urls=()).further_buses == {}


@pytest.mark.parametrize(
    ("urls", "why"),
    [
        ("valkey://:hush@a:1/0,valkey://:hush2@a:1/0", "names a bus twice"),
        ("valkeys://other:hush@first:1/0?ssl_ca_certs=/ca.pem", "names a bus twice"),
        ("hush@a:1", "each is one of valkey://"),
        ("amqp://:hush@a:1/", "each is one of valkey://"),
        ("valkey://b:1/0 valkey://:hush@a:1/0,hush", "each is one of valkey://"),
    ],
)
def test_a_list_of_buses_that_cannot_be_meant_is_refused_without_a_password(
    monkeypatch: pytest.MonkeyPatch, urls: str, why: str
) -> None:
    monkeypatch.setenv("PDTASKS_BUS_URL", "valkey://:hush@first:1/0")
    monkeypatch.setenv("PDTASKS_BUS_URLS", urls)

    with pytest.raises(ConfigurationError, match=why) as error:
        load_settings()

    assert "PDTASKS_BUS_URLS: " in str(error.value)
    assert "hush" not in str(error.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().api_port = 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "SmolLM2-135M-Instruct"),
        ({"model": "org/some-model"}, "some-model"),
        ({"model": "/models/folder/"}, "folder"),
        ({"model": "org/some-model", "served_model_name": "chat"}, "chat"),
    ],
)
def test_the_model_has_a_name_in_the_api(fields: dict[str, Any], name: str) -> None:
    assert Settings(**fields).model_name == name


def models(**spelt: Any) -> dict[str, Any]:
    """Further ones, as a person spells them."""
    return {"models": spelt}


def test_a_further_model_has_settings_and_queues_of_its_own() -> None:
    settings = Settings(
        model="/models/llama",
        max_model_len=512,
        engine_args={"dtype": "float32"},
        api_args="--enable-auto-tool-choice",
        max_num_seqs=7,
        **models(qwen="/models/qwen2", tiny={"model": "org/tiny", "max_model_len": 99}),
    )

    qwen, tiny = settings.of_model("qwen"), settings.of_model("tiny")

    assert (qwen.model, qwen.model_name, qwen.max_model_len) == ("/models/qwen2", "qwen", None)
    assert (tiny.model, tiny.model_name, tiny.max_model_len) == ("org/tiny", "tiny", 99)
    # What goes with the default model is none of theirs, what holds for all is.
    assert (qwen.engine_args, qwen.api_args, qwen.max_num_seqs) == ({}, "", 7)
    assert [s.queue_of(PREFILL) for s in (settings, qwen)] == ["prefill", "prefill.qwen"]
    assert [s.queue_of(DECODE, "tiny") for s in (settings, qwen)] == ["decode.tiny"] * 2
    assert [s.queue_of(DECODE, "llama") for s in (settings, qwen)] == ["decode"] * 2


def test_a_model_that_nobody_has_named_has_no_settings() -> None:
    with pytest.raises(ConfigurationError, match=r"'gpt'.*qwen"):
        Settings(**models(qwen="/models/qwen")).of_model("gpt")


def test_no_further_model_has_the_default_ones_name() -> None:
    with pytest.raises(ConfigurationError, match="llama is the default model's name"):
        make_settings(model="/models/llama", models={"llama": "/models/other"})
