"""A load that turns: what is read of its phases, noted of its moments, and drawn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdtasks.bench.turning.plot import draw_turning
from pdtasks.bench.turning.run import Phase, run_turning


def test_a_phase_is_read_as_it_is_written() -> None:
    assert Phase.read("1200/8@0.4") == Phase(1200, 8, 0.4)
    assert str(Phase.read("40/150@2")) == "40/150 at 2/s"


@pytest.mark.parametrize(
    "text", ["", "1200/8", "8@1", "0/8@1", "5/1@1", "5/8@0", "a/8@1", "5/8@-1"]
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not PROMPT/ANSWER@RATE"):
        Phase.read(text)


class StubStack(httpx.AsyncBaseTransport):
    """Answers at once; every third answer breaks off."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/pdtasks/overview":
            workers = [{"role": "prefill", "state": "ready"}, {"role": "decode", "state": "ready"}]
            if len(self.asked) > 20:
                workers[1]["role"] = "prefill"
            return httpx.Response(200, json={"workers": workers})
        body = json.loads(await request.aread())
        self.asked.append(body)
        return httpx.Response(200, text="".join(self._lines(body)))

    def _lines(self, body: dict[str, Any]) -> Iterator[str]:
        for number in range(body["max_tokens"]):
            if number == 1 and len(self.asked) % 3 == 0:
                yield 'data: {"error": {"message": "lost"}}\n\n'
                return
            chunk = {"choices": [{"token_ids": [number]}]}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield 'data: {"choices": [{}]}\n\ndata: [DONE]\n\n'


def test_each_phase_is_asked_and_what_changes_is_told() -> None:
    stack, told = StubStack(), list[str]()

    async def test() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(transport=stack, base_url="http://stub") as client:
            phases = [Phase(30, 4, 30.0), Phase(5, 8, 30.0)]
            found: list[dict[str, Any]] = await run_turning(client, "m", phases, 1.5, told.append)
            return found

    moments = asyncio.run(test())

    assert {(len(body["prompt"]), body["max_tokens"]) for body in stack.asked} == {(30, 4), (5, 8)}
    assert moments[0]["phase"] == "30/4 at 30/s"
    assert moments[-1]["phase"] == "5/8 at 30/s"
    assert 0 < moments[-1]["failed"] < moments[-1]["ended"]
    assert moments[-1]["roles"] == {"prefill": 2}
    assert any("2 prefill" in line for line in told)
    assert sum("a request failed: lost" in line or "lost" in line for line in told) == 1, (
        "one says it"
    )


def test_moments_are_drawn(tmp_path: Path) -> None:
    moments = [
        {
            "at_s": float(second),
            "phase": "a" if second < 5 else "b",
            "roles": {"prefill": 1, "decode": 2} if second < 7 else {"prefill": 2, "decode": 1},
            "ttft_p50_ms": None if second == 3 else 100.0 + second,
            "itl_p50_ms": 20.0,
        }
        for second in range(10)
    ]
    picture = tmp_path / "turning.png"

    draw_turning(moments, picture, ttft_s=0.2, itl_s=0.05)

    assert picture.read_bytes().startswith(b"\x89PNG")
