"""Can an answer exist at all? Grammars that no finite text satisfies are refused before any work.

vLLM takes them: the first mask then forbids every token, and the answer is empty or an error.
"""

from __future__ import annotations

import json
import re
from typing import Any

import xgrammar
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

#: In xgrammar's own notation: what stands for characters, and never for a rule.
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]')
_RULE = re.compile(r"^(\w+) ::= (.*)$", re.MULTILINE)
#: A rule in another rule, and how often at least.
_REFERENCE = re.compile(r"([A-Za-z_]\w*)(?:\{(\d+), -?\d+\})?")
#: Rules of structural tags: text goes on whatever the tag's own rule says.
_DISPATCH = re.compile(r"\w*Dispatch\(")


def require_possible(params: SamplingParams) -> None:
    """Raises VLLMValidationError when `params` ask for an answer that no text can be.

    A grammar that cannot be read is none of this function's business: vLLM refuses it.
    """
    wanted = params.structured_outputs
    if wanted is None:
        return
    try:
        grammar = _grammar(wanted)
    except (RuntimeError, ValueError, TypeError):
        return
    if grammar is not None and not _has_text(str(grammar)):
        raise VLLMValidationError(
            "structured_outputs: no finite text satisfies this grammar or schema; look for a rule "
            "or $ref that leads back to itself without a way out",
            parameter="structured_outputs",
        )


def _grammar(wanted: StructuredOutputsParams) -> Any:
    if wanted.json is not None:
        schema = wanted.json if isinstance(wanted.json, str) else json.dumps(wanted.json)
        return xgrammar.Grammar.from_json_schema(schema)
    if wanted.grammar is not None:
        return xgrammar.Grammar.from_ebnf(wanted.grammar)
    return None  # a regex, a choice or any JSON object: each has a text


def _has_text(notation: str) -> bool:
    """Does rule `root` have a finite text?  The textbook's fixed point of productive symbols."""
    rules = {
        # (literals first: they may contain `|`, parentheses and names)
        name: [_needed(alternative) for alternative in _LITERAL.sub(" ", body).split("|")]
        for name, body in _RULE.findall(notation)
        if not _DISPATCH.search(body)
    }
    known = set(re.findall(r"^(\w+) ::=", notation, re.MULTILINE))
    productive = known - rules.keys()
    while grown := {
        name
        for name, alternatives in rules.items()
        if name not in productive and any(needed & known <= productive for needed in alternatives)
    }:
        productive |= grown
    return "root" not in known or "root" in productive


def _needed(alternative: str) -> set[str]:
    return {name for name, least in _REFERENCE.findall(alternative) if least != "0"}
