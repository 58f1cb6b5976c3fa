"""Is every private name of another package that we use named in this folder?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("pdtasks", "api", "configs")

#: Private by their spelling alone.
_PUBLIC = {
    "_exit",  # os, documented
    "_Hash",  # typeshed's name of hashlib's objects
    "_actions",  # argparse has no other way to ask; api/flags.py
    "_pdtasks_grammar_manager",  # ours, on vLLM's request; kv/resume.py
}


def _trees() -> dict[Path, ast.Module]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {file: ast.parse(file.read_text()) for file in files}


def _our_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _foreign_names(tree: ast.AST, ours: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in ours:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGES):
            yield from (alias.name for alias in node.names if _is_private(alias.name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_that_we_use_is_tested_here() -> None:
    trees = _trees()
    ours = {name for tree in trees.values() for name in _our_names(tree)}
    used = {name for tree in trees.values() for name in _foreign_names(tree, ours)}
    tested = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))

    assert "_get_attn_isa" in used, "nothing is found any more"
    assert sorted(name for name in used - _PUBLIC if name not in tested) == []
