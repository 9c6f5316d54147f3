"""Long streams that end by themselves, and queues that keep their written policy."""

import asyncio

import pytest

from esper.mesh.errors import LimitExceeded
from esper.mesh.streams import BoundedQueue, Overflow, race_drain, sleep_or_drain, until_drain


async def _numbers(limit: int, closed: list[bool]):
    try:
        for number in range(limit):
            yield number
        await asyncio.Event().wait()
    finally:
        closed.append(True)


async def test_a_stream_that_waits_ends_at_the_drain_and_closes_its_source() -> None:
    """A stream with nothing to say ends as soon as the drain event is set."""
    drain, closed = asyncio.Event(), []
    asyncio.get_running_loop().call_later(0.02, drain.set)
    async with asyncio.timeout(2):
        assert [0, 1, 2] == [n async for n in race_drain(_numbers(3, closed), drain)]
    assert [True] == closed


async def test_a_busy_stream_ends_at_the_drain_too() -> None:
    """A source that always has an item cannot outlive the drain."""
    drain, got = asyncio.Event(), []
    async for number in race_drain(_numbers(100, []), drain):
        got.append(number)
        if number == 4:
            drain.set()
    assert [0, 1, 2, 3, 4] == got


async def test_a_stream_that_ends_before_the_drain_ends_normally() -> None:
    """Without a drain nothing changes, and no task stays behind."""

    async def source():
        yield 1
        yield 2

    before = asyncio.all_tasks()
    assert [1, 2] == [n async for n in race_drain(source(), asyncio.Event())]
    await asyncio.sleep(0)
    assert before == asyncio.all_tasks()


async def test_the_sources_own_errors_pass() -> None:
    """A TimeoutError of the source is not mistaken for the drain."""

    async def source():
        yield 1
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        [n async for n in race_drain(source(), asyncio.Event())]


async def test_cancelling_the_consumer_cancels_the_stream() -> None:
    """Cancellation from outside is not swallowed by the race."""
    closed: list[bool] = []

    async def consume() -> None:
        async for _ in race_drain(_numbers(0, closed), asyncio.Event()):
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [True] == closed


async def test_a_plain_iterator_without_aclose_is_fine() -> None:
    """Sources need no more than `__anext__`."""
    queue: BoundedQueue[int] = BoundedQueue(4, Overflow.DROP_OLDEST)
    queue.put(1)
    queue.close()
    assert [1] == [n async for n in race_drain(queue, asyncio.Event())]


async def test_until_drain_gives_the_result_or_the_default() -> None:
    """Work that ends first gives its result; the drain gives the default and cancels the work."""
    drain, cancelled = asyncio.Event(), []

    async def slow() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "never"

    assert "done" == await until_drain(asyncio.sleep(0, "done"), drain)
    asyncio.get_running_loop().call_later(0.01, drain.set)
    assert "default" == await until_drain(slow(), drain, "default")
    assert [True] == cancelled


async def test_sleep_or_drain_says_which() -> None:
    """False after the sleep, True at the drain."""
    drain = asyncio.Event()
    assert await sleep_or_drain(0.001, drain) is False
    asyncio.get_running_loop().call_later(0.01, drain.set)
    async with asyncio.timeout(2):
        assert await sleep_or_drain(60, drain) is True


async def test_drop_oldest_keeps_the_newest_and_counts() -> None:
    """Telemetry: what is lost is the oldest, and one can see how much."""
    queue: BoundedQueue[int] = BoundedQueue(3, Overflow.DROP_OLDEST)
    assert all(queue.put(n) for n in range(5))
    queue.close()
    assert (3, 2) == (len(queue), queue.dropped)
    assert [2, 3, 4] == [n async for n in queue]


async def test_coalesce_keeps_the_latest_of_each_key_in_the_first_ones_place() -> None:
    """State: one waiting item per key, the latest; beyond the room for keys the oldest key goes."""
    queue: BoundedQueue[tuple[str, int]] = BoundedQueue(2, Overflow.COALESCE, key=lambda item: item[0])
    for item in (("a", 1), ("b", 1), ("a", 2)):
        queue.put(item)
    assert (2, 1, 0) == (len(queue), queue.coalesced, queue.dropped)
    queue.put(("c", 1))
    assert ([("b", 1), ("c", 1)], 1) == (queue.drain_now(), queue.dropped)
    assert 0 == len(queue)


async def test_end_stream_delivers_what_waits_and_then_says_why() -> None:
    """Commands: nothing is lost in silence; the subscriber learns that it must start anew."""
    queue: BoundedQueue[int] = BoundedQueue(2, Overflow.END_STREAM)
    assert [True, True, False, False] == [queue.put(n) for n in range(4)]
    assert queue.closed
    assert [0, 1] == [await anext(queue), await anext(queue)]
    with pytest.raises(LimitExceeded, match="subscribe again") as caught:
        await anext(queue)
    assert "SUBSCRIBER_TOO_SLOW" == caught.value.reason


async def test_a_waiting_consumer_is_woken_by_put_and_by_close() -> None:
    """Iteration waits for items and ends at close."""
    queue: BoundedQueue[int] = BoundedQueue(2, Overflow.DROP_OLDEST)
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, queue.put, 7)
    loop.call_later(0.02, queue.close)
    async with asyncio.timeout(2):
        assert [7] == [n async for n in queue]
    assert queue.put(8) is False


@pytest.mark.parametrize(
    ("maxsize", "overflow", "key"),
    [(0, Overflow.DROP_OLDEST, None), (1, Overflow.COALESCE, None), (1, Overflow.END_STREAM, str)],
)
def test_queues_that_make_no_sense_are_refused(maxsize: int, overflow: Overflow, key: object) -> None:
    """No room, no key to coalesce by, a key that nobody reads."""
    with pytest.raises(ValueError, match=r"expected|at least|a key goes with"):
        BoundedQueue(maxsize, overflow, key=key)
