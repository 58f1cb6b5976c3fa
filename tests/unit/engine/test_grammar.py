"""Is an answer that cannot exist seen as such, and no other?"""

from __future__ import annotations

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from pdtasks.engine.grammar import require_possible


def params(**wanted: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**wanted))


def node(**fields: Any) -> dict[str, Any]:
    """A tree whose children are trees."""
    return {"$defs": {"node": {"type": "object", **fields}}, "$ref": "#/$defs/node"}


CHILD = {"x": {"$ref": "#/$defs/node"}}


@pytest.mark.parametrize(
    "wanted",
    [
        {"grammar": "root ::= root"},
        {"grammar": "root ::= a\na ::= root"},
        {"grammar": 'root ::= "a" more\nmore ::= more "b"'},
        {"grammar": "root ::= x{2,3}\nx ::= y+\ny ::= y"},
        {"json": {"$ref": "#"}},
        {"json": '{"$ref": "#"}'},
        {"json": node(properties=CHILD, required=["x"])},
        {"json": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}},
    ],
)
def test_a_grammar_without_any_finite_text_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match="no finite text") as refused:
        require_possible(params(**wanted))

    assert refused.value.parameter == "structured_outputs"


@pytest.mark.parametrize(
    "wanted",
    [
        {"grammar": 'root ::= "a" root | "b"'},
        {"grammar": 'root ::= root "a" | "b"'},
        {"grammar": 'root ::= loop* "a"\nloop ::= loop'},
        {"grammar": 'root ::= loop{0,2} "a"\nloop ::= loop'},
        {"grammar": 'root ::= "(" x\nx ::= [a-z|()\\]"] | "x ::= x |"'},
        {"grammar": 'root ::= ""'},
        {"json": node(properties=CHILD)},
        {"json": {"type": "array", "items": {"$ref": "#"}}},
        {"json": {"type": "object", "properties": {"a|b(": {"enum": ["(", "|", '"']}}}},
        {"json": {"type": "string", "maxLength": 10**9}},
        {"json_object": True},
        {"regex": "a+"},
        {"choice": ["root", "loop"]},
    ],
)
def test_any_other_is_not(wanted: dict[str, Any]) -> None:
    require_possible(params(**wanted))


@pytest.mark.parametrize("wanted", [{"grammar": "nonsense"}, {"json": "{"}, {"json": {"type": 5}}])
def test_what_cannot_be_read_is_left_to_vllm(wanted: dict[str, Any]) -> None:
    require_possible(params(**wanted))


def test_a_request_for_plain_text_is_none_of_its_business() -> None:
    require_possible(SamplingParams())
