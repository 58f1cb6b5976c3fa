"""Two models never pass for one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdtasks.kv.identity import model_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {f"layers.{n}.weight": torch.full((256, 256), float(n)) for n in range(40)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _digest(folder: Path) -> str:
    return model_digest(str(folder), None, "auto")


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    assert _digest(shutil.copytree(model, tmp_path / "copy")) == _digest(model)


@pytest.mark.parametrize("layer", range(40))
def test_a_fine_tune_of_any_one_layer_is_another_model(model: Path, layer: int) -> None:
    before = _digest(model)
    tensors = {
        f"layers.{n}.weight": torch.full((256, 256), n + 0.5 * (n == layer)) for n in range(40)
    }

    save_file(tensors, model / "model.safetensors")

    assert _digest(model) != before


def test_another_configuration_is_another_model(model: Path) -> None:
    before = _digest(model)

    (model / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}')

    assert _digest(model) != before


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"no weights"])
def test_damaged_weights_still_have_a_digest(model: Path, damage: bytes) -> None:
    (model / "model.safetensors").write_bytes(damage)

    assert _digest(model) == _digest(model)


def test_without_files_the_name_and_revision_decide() -> None:
    digests = {
        model_digest(name, revision, "auto")
        for name in ("org/a", "org/b")
        for revision in (None, "1", "2")
    }

    assert len(digests) == 6
