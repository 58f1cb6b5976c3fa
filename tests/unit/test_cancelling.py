"""How does an asyncio task end for certain?"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from pdtasks.cancelling import end


async def _for_ever() -> None:
    await asyncio.Event().wait()


def test_tasks_end_and_their_errors_are_nobodys_business() -> None:
    async def fails_when_cancelled() -> None:
        try:
            await _for_ever()
        finally:
            raise ValueError

    async def test() -> None:
        tasks = [asyncio.create_task(run()) for run in (_for_ever, fails_when_cancelled)]
        await asyncio.sleep(0)

        await end(tasks)

        assert [task.done() for task in tasks] == [True, True]

    asyncio.run(test())


def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    async def loses_one() -> None:
        with suppress(asyncio.CancelledError):
            await _for_ever()
        await _for_ever()

    async def test() -> None:
        task = asyncio.create_task(loses_one())
        await asyncio.sleep(0)

        async with asyncio.timeout(10):
            await end([task])

        assert task.cancelled()

    asyncio.run(test())


def test_a_task_that_never_ends_is_left_after_the_time_given() -> None:
    async def test() -> None:
        may_end = False

        async def refuses() -> None:
            while not may_end:
                with suppress(asyncio.CancelledError):
                    await _for_ever()

        task = asyncio.create_task(refuses())
        await asyncio.sleep(0)

        async with asyncio.timeout(10):
            await end([task], within_s=0.1)

        assert not task.done()
        may_end = True
        await end([task])

    asyncio.run(test())


def test_nothing_to_end_is_fine() -> None:
    asyncio.run(end([]))
