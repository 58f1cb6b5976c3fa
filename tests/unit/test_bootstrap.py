"""Does `./pd` set up once, say what failed, and never trip over what an earlier run left?

The real script runs on a copy of the checkout's few files that it reads.  Python, pip and the tools
are played by one small script, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "locks" / "cpu-py311.txt"
# Their CUDA builds cannot load beside a CPU torch; torch and triton are no part of the lock either.
NOT_LOCKED = {"pdtasks", "torch", "torchaudio", "torchcodec", "torchvision", "triton"}
DEADLINE_S = 60.0

#: Plays Python: makes environments that contain itself, and notes what pip is asked for.
FAKE_PYTHON = """\
#!/bin/bash
here=$(dirname "$(readlink -f "$0")")
note() { printf '%s\\n' "$*" >>"$FAKE_NOTES"; }
make_tool() {
  printf '#!/bin/bash\\necho "$(basename "$0") $*" >>"$FAKE_NOTES"\\nexit %s\\n' "$2" >"$here/$1"
  chmod +x "$here/$1"
}
case "$1 $2" in
  '-m venv')
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    ;;
  '-m pip')
    note "$@"
    if [ -n "$FAKE_PIP_WAITS" ] && [[ "$*" == *" -r "* ]]; then
      touch "$FAKE_PIP_WAITS.began"
      while [ ! -e "$FAKE_PIP_WAITS" ]; do sleep 0.05; done
    fi
    if [ -n "$FAKE_PIP_FAILS" ] && [[ "$*" == *"$FAKE_PIP_FAILS"* ]]; then
      echo 'ERROR: no route to the package index'
      exit 3
    fi
    if [[ "$*" == *" -e "* ]]; then
      for tool in pdtasks ruff mypy lint-imports; do
        make_tool $tool "$([ "$tool" = "$FAKE_TOOL_FAILS" ] && echo 7 || echo 0)"
      done
    fi
    ;;
  '-m pytest')
    note "$@"
    case " $FAKE_TOOL_FAILS " in *" $3 "*) exit 7 ;; esac
    ;;
  '-V '*) echo 'Python 3.11.0 (played)' ;;
  *)
    if [[ "$*" == *resolve_model* ]]; then note model; exit 0; fi
    exec "$REAL_PYTHON" "$@"
    ;;
esac
"""


class Checkout:
    """A checkout in a folder of its own, with the played Python."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.notes_file = home / "notes"
        python = home / "played-python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        (folder / "locks").mkdir(parents=True)
        for name in ("pd", "pyproject.toml", "locks/cpu-py311.txt"):
            shutil.copy2(ROOT / name, folder / name)
        # A bare environment: what the tests' own one contains must not be needed.
        self.environment = {
            "HOME": str(home),
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(python),
            "REAL_PYTHON": str(Path(sys.base_prefix) / "bin" / "python3"),
            "FAKE_NOTES": str(self.notes_file),
            "PDTASKS_DEVICE": "cpu",
            "PDTASKS_BROKER_URL": "amqp://elsewhere/",  # or RabbitMQ would be installed
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        # Where tests run in the background SIGINT is ignored, and children would inherit that;
        # a signal with a handler is back to its default in them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [str(self.folder / "pd"), *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, output

    def notes(self) -> list[str]:
        return self.notes_file.read_text().splitlines() if self.notes_file.exists() else []

    def installs(self) -> int:
        """How often everything was installed."""
        return sum(" -r " in note for note in self.notes())

    @property
    def stamp(self) -> Path:
        return self.folder / ".venv" / "pdtasks.stamp"


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path / "a checkout", tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_help_needs_no_set_up(checkout: Checkout) -> None:
    for arguments in ((), ("--help",), ("help",)):
        status, output = checkout.run(*arguments)
        assert status == 0
        assert "./pd VERB" in output
    assert not (checkout.folder / ".venv").exists()


def test_the_first_run_sets_up_then_runs_the_verb(checkout: Checkout) -> None:
    status, output = checkout.run("demo", "--prompt", "two words")

    assert status == 0
    steps = re.findall(r"^pd: (making|installing \S+) .*…$", output, re.MULTILINE)
    assert steps[0] == "making"
    assert steps[-1] == "installing pdtasks"
    assert checkout.notes()[-1] == "pdtasks demo --prompt two words"
    # torch has a step of its own, in its CPU build
    assert sum("torch==2.13.0+cpu" in note for note in checkout.notes()) == 1


def test_what_only_tests_need_is_installed_for_tests_alone(
    checkout: Checkout, tmp_path: Path
) -> None:
    # Given a system without browser and promtool, on which nothing can be installed
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in Path("/usr/bin").iterdir():
        if tool.name not in ("chromium", "promtool", "apt-get"):
            (tools / tool.name).symlink_to(tool)

    assert checkout.run("status", PATH=str(tools))[0] == 0
    status, output = checkout.run("test", PATH=str(tools))

    assert status == 1
    assert "failed while installing the system packages chromium prometheus" in output


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.run("status")
    installs = checkout.installs()
    notes = checkout.notes()

    status, output = checkout.run("status", "--json")

    assert (status, output) == (0, "")
    assert checkout.installs() == installs == 1
    assert [note.strip() for note in checkout.notes()[len(notes) :]] == ["pdtasks status --json"]


def test_a_step_that_fails_says_which_why_and_what_to_do(checkout: Checkout) -> None:
    status, output = checkout.run("demo", FAKE_PIP_FAILS=" -r ")

    assert status == 1
    assert re.search(r"failed while installing \d+ packages", output)
    assert "why: exit status 3" in output
    assert "no route to the package index" in output
    assert "what to do: check the network" in output
    assert not checkout.stamp.exists()
    assert not any(note.startswith("pdtasks") for note in checkout.notes())

    # And the next run is not in its way.
    assert checkout.run("demo")[0] == 0


def test_torch_comes_from_its_own_index_where_pip_s_places_lack_it(checkout: Checkout) -> None:
    checkout.run("demo", FAKE_PIP_FAILS="torch==")

    first, second, _ = (note for note in checkout.notes() if "torch==" in note)
    assert "--index-url" not in first
    assert "--index-url https://download.pytorch.org/whl/cpu" in second


def test_where_no_place_has_torch_for_cpu_the_plain_one_is_taken_and_its_size_is_said_before(
    checkout: Checkout,
) -> None:
    status, output = checkout.run("demo", FAKE_PIP_FAILS="torch==2.13.0+cpu")

    assert status == 0
    asked = [note for note in checkout.notes() if "torch==" in note]
    assert len(asked) == 3
    assert asked[-1].endswith("torch==2.13.0")
    assert "--no-deps" not in asked[-1], "it does not load without its libraries"
    said = output.index("taking plain torch==2.13.0, which is several GB")
    assert said < output.index("installing plain PyTorch")


def test_without_any_torch_all_places_that_were_tried_are_named(checkout: Checkout) -> None:
    status, output = checkout.run("demo", FAKE_PIP_FAILS="torch==")

    assert status == 1
    assert "failed while installing plain PyTorch" in output
    for place in ("pip's configured places", "PIP_FIND_LINKS", "download.pytorch.org/whl/cpu"):
        assert place in output


def test_a_set_up_that_was_killed_is_made_anew(checkout: Checkout, tmp_path: Path) -> None:
    # Given a ./pd that was killed while its pip goes on
    release = tmp_path / "release"
    killed = checkout.start("demo", FAKE_PIP_WAITS=str(release))
    wait_until(release.with_name("release.began").exists, DEADLINE_S, "pip")
    killed.kill()
    killed.wait(DEADLINE_S)

    # When the next one comes, it waits for that pip, lest both write into one folder
    second = checkout.start("demo")
    assert second.stdout is not None
    assert "another ./pd sets up" in second.stdout.readline()
    release.touch()
    output, _ = second.communicate(timeout=DEADLINE_S)

    assert second.returncode == 0
    assert "unfinished" in output
    assert checkout.installs() == 2
    assert not (checkout.folder / ".venv.old").exists()


def test_an_interrupt_ends_pip_too_and_the_next_run_succeeds(
    checkout: Checkout, tmp_path: Path
) -> None:
    release = tmp_path / "release"  # never appears: only a signal ends that pip
    process = checkout.start("demo", FAKE_PIP_WAITS=str(release))
    wait_until(release.with_name("release.began").exists, DEADLINE_S, "pip")

    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 130
    assert "interrupted while installing" in output
    assert not checkout.stamp.exists()
    # No pip holds the lock any more.
    status, output = checkout.run("demo")
    assert status == 0
    assert "another ./pd" not in output


def test_two_at_once_set_up_once(checkout: Checkout, tmp_path: Path) -> None:
    release = tmp_path / "release"
    first = checkout.start("up", FAKE_PIP_WAITS=str(release))
    wait_until(release.with_name("release.began").exists, DEADLINE_S, "pip")
    second = checkout.start("status")
    assert second.stdout is not None
    assert "another ./pd sets up" in second.stdout.readline()

    release.touch()
    first.communicate(timeout=DEADLINE_S)
    second.communicate(timeout=DEADLINE_S)

    assert (first.returncode, second.returncode) == (0, 0)
    assert checkout.installs() == 1


def test_a_changed_lock_makes_the_environment_anew(checkout: Checkout) -> None:
    checkout.run("demo")
    with (checkout.folder / "locks" / "cpu-py311.txt").open("a") as lock:
        lock.write("one-more==1\n")

    checkout.run("demo")

    assert checkout.installs() == 2


def test_a_changed_linter_setting_installs_nothing(checkout: Checkout) -> None:
    checkout.run("demo")
    with (checkout.folder / "pyproject.toml").open("a") as project:
        project.write("[tool.something]\nkey = 1\n")

    checkout.run("demo")

    assert checkout.installs() == 1


def test_a_moved_checkout_gets_an_environment_of_its_own(checkout: Checkout) -> None:
    checkout.run("demo")
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))

    status, _ = checkout.run("demo")

    assert status == 0
    assert checkout.installs() == 2


def test_a_python_that_does_not_fit_is_refused(checkout: Checkout) -> None:
    for python, told in (("/nowhere/python", "not there"), ("/bin/false", "which is")):
        status, output = checkout.run("demo", PYTHON=python)
        assert status == 1
        assert "failed while looking for Python" in output
        assert told in output
        assert "Python 3.11" in output


def test_a_cuda_host_gets_the_cuda_build(checkout: Checkout) -> None:
    status, _ = checkout.run("demo", PDTASKS_DEVICE="cuda")

    assert status == 0
    installed = [note for note in checkout.notes() if " install " in note]
    assert len(installed) == 1
    assert installed[0].endswith(f"-e {checkout.folder}[cuda,model,dev,bench]")


def test_linters_come_first_and_real_engines_last(checkout: Checkout) -> None:
    status, output = checkout.run("test")

    assert status == 0
    after_set_up = checkout.notes()[checkout.notes().index("model") :]
    assert [note.split()[0] for note in after_set_up[:4]] == [
        "model",
        "ruff",
        "ruff",
        "lint-imports",
    ]
    assert all("tests/integration" in note for note in after_set_up[4:6])
    assert sorted(after_set_up[6:]) == [
        "-m pytest tests/acceptance",
        "-m pytest tests/unit",
        "mypy pdtasks api configs tests",
    ]
    assert "failed" not in output


@pytest.mark.parametrize("folder", ["tests/integration"])
def test_both_halves_of_a_folder_are_all_of_it(checkout: Checkout, folder: str) -> None:
    checkout.run("test")

    half, rest = sorted((note for note in checkout.notes() if folder in note), key=len)
    files = half.removeprefix("-m pytest ").split()
    assert len(files) > 1
    assert all((ROOT / file).is_file() for file in files)
    assert rest.split() == ["-m", "pytest", folder, *(f"--ignore={file}" for file in files)]


def test_with_arguments_one_thing_comes_after_the_other(checkout: Checkout) -> None:
    status, _ = checkout.run("test", "-k", "some thing")

    assert status == 0
    assert checkout.notes()[-2:] == [
        "mypy pdtasks api configs tests",
        "-m pytest -k some thing",
    ]


def test_a_linter_that_fails_ends_the_tests_with_its_status(checkout: Checkout) -> None:
    status, output = checkout.run("test", FAKE_TOOL_FAILS="lint-imports")

    assert status == 7
    assert output.splitlines()[-1] == "pd: lint-imports failed with exit status 7"
    assert checkout.notes()[-1].strip() == "lint-imports"


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        ("mypy", "types and unit tests"),
        ("tests/unit", "types and unit tests"),
        ("tests/integration", "integration tests"),
        ("tests/integration/test_bench_batch.py", "integration tests, other half"),
        ("tests/acceptance", "acceptance tests"),
        ("tests/integration tests/acceptance", "integration tests, acceptance tests"),
    ],
)
def test_what_fails_is_told_when_all_has_run(checkout: Checkout, tool: str, told: str) -> None:
    status, output = checkout.run("test", FAKE_TOOL_FAILS=tool)

    assert status == 7
    assert output.splitlines()[-1] == f"pd: {told} failed with exit status 7"
    assert "-m pytest tests/acceptance" in checkout.notes()


# --- the lock -------------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s;,]+", line) for line in lines), "not all are exact"
    return dict(line.split("==") for line in lines)


def test_the_lock_leaves_out_what_must_not_stand_beside_a_cpu_torch() -> None:
    names = set(locked())

    assert not names & NOT_LOCKED
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in names)


def test_the_lock_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = locked()

    wanted = project["dependencies"]
    for extra in ("cpu", "model", "dev", "bench"):
        wanted = wanted + extras[extra]

    for line in wanted:
        requirement = Requirement(line)
        if requirement.name not in NOT_LOCKED:
            version = pins.get(canonicalize_name(requirement.name))
            assert version is not None, f"{line}: run locks/renew"
            assert requirement.specifier.contains(version), f"{line}, locked {version}"


@pytest.mark.parametrize("python", ["3.11.2", "3.11.13", "3.12.3"])
def test_the_lock_is_complete_on_every_python(python: str) -> None:
    """A lock made with one Python must not lack what another needs (Debian 12 has 3.11.2)."""
    pins = locked()
    environment = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "extra": "",
    }

    unmet = []
    for name in pins:
        for line in metadata.distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            needed = canonicalize_name(requirement.name)
            if needed in NOT_LOCKED:
                continue
            if not requirement.specifier.contains(pins.get(needed, ""), prereleases=True):
                unmet.append(f"{name}: {line}, locked {pins.get(needed)}")

    assert unmet == []
