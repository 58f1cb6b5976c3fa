"""Do bursts, with callers that hang up, ever stall a worker or cost it its connection?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder

from pdtasks.bench.connections import count_connections
from pdtasks.broker.aborting import Aborter
from pdtasks.bus.presence import read_workers
from pdtasks.messages import StepReply, read_message
from pdtasks.pipeline import Publisher
from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker
from tests.waiting import wait_until

REQUESTS = 8_000
BURST = 500
#: Seconds for the answers of one burst; a machine that does nothing else needs less than one.
_BURST_S = 30.0


class Caller:
    """One side of a burst: asks for all, then reads what comes, each entry once."""

    def __init__(self, services: Services, publisher: Publisher, name: str) -> None:
        self._asker = Asker(services.bus, publisher)
        self._name = name
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._read_until = "-"
        self.asked: dict[str, list[int]] = {}  #: the answer that is due
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    def ask(self, num_tokens: int) -> None:
        request_id = f"{self._name}-{len(self.asked)}"
        self.asked[request_id] = [100, 101][:num_tokens]
        # Not waited for: its confirm comes while the next is sent.
        self._asker.send(request_id, max_tokens=num_tokens)

    def has_all(self) -> bool:
        for message in self._new_messages():
            assert not message.failures
            if not message.outputs:
                continue
            for output in self._decoder.decode(message.outputs).outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.ended.add(output.request_id)
        return self.ended == self.asked.keys()

    def _new_messages(self) -> Iterator[StepReply]:
        found = self._asker.bus.xrange(self._asker.stream, min=self._read_until)
        for entry_id, fields in cast("list[tuple[bytes, dict[bytes, bytes]]]", found):
            self._read_until = f"({entry_id.decode()}"
            yield read_message(StepReply, fields[b"m"])

    def hang_up(self) -> None:
        self._asker.hang_up()


def test_bursts_whose_callers_hang_up_cost_no_connection_and_no_answer(
    start_worker: StartWorker, services: Services, publisher: Publisher, aborter: Aborter
) -> None:
    # Given workers that take as many jobs at once as the product's, whose engines end them at
    # once, and everybody's connections, which open with the first use
    options: dict[str, Any] = {"concurrency": 64, "stub_silent": "1"}
    workers = [start_worker(role, **options) for role in ("prefill", "decode")]
    first = Caller(services, publisher, "first")
    first.ask(num_tokens=2)
    aborter.abort(["nobody"])
    wait_until(first.has_all)
    opened_before = count_connections(services.rabbit.api_url)

    # When bursts come, one right after the other
    for number in range(REQUESTS // BURST):
        stays = Caller(services, publisher, f"stays{number}")
        leaves = Caller(services, publisher, f"leaves{number}")
        # Every fourth goes through both stages.
        num_tokens = 2 if number % 4 == 3 else 1
        for _ in range(BURST // 2):
            stays.ask(num_tokens)
            leaves.ask(num_tokens)
        # and half of the callers hang up: the process is gone, or it says so
        if number % 2:
            leaves.hang_up()
        else:
            aborter.abort(leaves.asked)

        # Then all others are answered
        wait_until(stays.has_all, _BURST_S, f"burst {number} is answered")
        assert stays.tokens == stays.asked

    # and the workers are idle and ready, with the connections that they had
    def all_are_idle() -> bool:
        found = [w for w in read_workers(services.bus) if w.pid in {w.pid for w in workers}]
        return [(w.state, w.active) for w in found] == [("ready", 0)] * len(workers)

    wait_until(all_are_idle)
    assert count_connections(services.rabbit.api_url) == opened_before
    for worker in workers:
        assert "Connection to broker lost" not in worker.log
