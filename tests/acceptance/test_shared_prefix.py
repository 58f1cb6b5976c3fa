"""A prefix that one prefill worker has computed, the next one loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest

from tests.acceptance.nursery import Nursery
from tests.acceptance.running_stack import MODEL, Stack, answers_by, ask

PREFIX = "Tell me about the moon and its phases. " * 30  # two whole blocks, and a bit
BLOCK = 128  # tokens, vLLM's default on a CPU


@pytest.fixture(scope="module")
def second_worker(
    stack: Stack, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("second")
    with stack.joined_by("prefill", folder, {}, nursery) as pid:
        yield pid


def _cached_tokens(body: dict[str, Any]) -> int:
    cached: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def _computed_by_the_first_worker(
    client: httpx.Client, prompt: str, name: str, **fields: Any
) -> tuple[str, dict[str, Any]]:
    """What `prompt`, behind a number, is answered when the second worker has not seen it."""
    for number in range(6):
        numbered = f"{number}. {prompt}"
        body = ask(client, numbered, f"{name}-first-{number}", **fields)
        if not body["stages"]["prefill"]["worker"].startswith("other@"):
            return numbered, body
    raise AssertionError("the second worker has answered all")


def test_a_second_prompt_loads_the_common_prefix_on_any_worker(
    stack: Stack, client: httpx.Client, second_worker: int
) -> None:
    prompt, first = _computed_by_the_first_worker(
        client, PREFIX + "Begin.", "prefix", max_tokens=12
    )

    # When another worker gets prompts that begin alike
    bodies = answers_by(
        stack,
        "prefill",
        second_worker,
        lambda n: ask(client, prompt, f"prefix-{n}", max_tokens=12),
    )

    # Then it loads what the first one has left, says so, and answers the same
    whole_blocks = first["usage"]["prompt_tokens"] // BLOCK
    assert whole_blocks > 1
    assert any(b["stages"]["prefill"]["kv_blocks_loaded"] == whole_blocks for b in bodies)
    for body in bodies:
        assert _cached_tokens(body) == whole_blocks * BLOCK
        assert body["choices"][0]["message"] == first["choices"][0]["message"]
        assert body["stages"]["decode"]["kv_blocks_recomputed"] == 0


def test_eight_answers_to_a_prompt_cost_one_prefill(
    stack: Stack, client: httpx.Client, second_worker: int
) -> None:
    wanted = {"n": 8, "temperature": 1.0, "seed": 5, "max_tokens": 4}
    prompt = "Eight. " + PREFIX

    def asked(name: str, **fields: Any) -> tuple[list[str], list[dict[str, Any]], int]:
        body = {"model": MODEL, "prompt": prompt} | wanted | fields
        answer = client.post("/v1/completions", json=body, headers={"X-Request-Id": name}).json()
        report = client.get(f"/pdtasks/requests/cmpl-{name}").json()
        texts = [choice["text"] for choice in answer["choices"]]
        return texts, report["sequences"], answer["usage"]["prompt_tokens"]

    texts, sequences, num_prompt = asked("eight")

    # Then one of the two workers has computed it, and for the others what is behind whole blocks
    prefills = [sequence["prefill"] for sequence in sequences]
    assert len(prefills) == 8
    assert len({report["worker"] for report in prefills}) == 1
    computed = sorted(num_prompt - report["cached_tokens"] for report in prefills)
    assert computed == [num_prompt % BLOCK] * 7 + [num_prompt]
    assert sum(sequence["decode"]["kv_blocks_recomputed"] for sequence in sequences) == 0
    # And each has its own first token, as if it had been asked for alone
    assert texts == [asked(f"alone-{n}", n=1, seed=5 + n)[0][0] for n in range(8)]


def test_another_salt_shares_nothing(
    stack: Stack, client: httpx.Client, second_worker: int
) -> None:
    prompt, _ = _computed_by_the_first_worker(
        client, "Salted. " + PREFIX, "salt", max_tokens=4, cache_salt="one tenant"
    )

    bodies = answers_by(
        stack,
        "prefill",
        second_worker,
        lambda n: ask(client, prompt, f"salt-{n}", max_tokens=4, cache_salt=f"other tenant {n}"),
    )

    for body in bodies:
        assert _cached_tokens(body) == 0
        assert body["stages"]["prefill"]["kv_blocks_loaded"] == 0


def test_a_lost_prefix_is_computed_again(
    stack: Stack, client: httpx.Client, second_worker: int
) -> None:
    prompt, first = _computed_by_the_first_worker(client, "Lost. " + PREFIX, "lost", max_tokens=12)

    # When the blocks in the store are damaged
    for key in stack.kv.scan_iter():
        value = bytearray(cast("bytes | None", stack.kv.get(key)) or b"gone meanwhile")
        value[-1] ^= 1
        stack.kv.set(key, bytes(value), keepttl=True, xx=True)
    bodies = answers_by(
        stack,
        "prefill",
        second_worker,
        lambda n: ask(client, prompt, f"lost-{n}", max_tokens=12),
    )

    # Then it is computed, counted, and the answer is the same
    assert any(b["stages"]["prefill"]["kv_blocks_recomputed"] > 1 for b in bodies)
    for body in bodies:
        assert body["choices"][0]["message"] == first["choices"][0]["message"]
