"""Several asynchronous generators as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they come. The first error ends it; closing it closes all streams."""
    if len(streams) == 1:  # the common case costs no task and no queue
        async with aclosing(streams[0]) as items:
            async for item in items:
                yield item
        return
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue(maxsize=len(streams))
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        for _ in pumps:
            while (event := await queue.get()) is not None:  # each pump's last word
                if isinstance(event, Exception):
                    raise event
                yield event[0]
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T, None], queue: "asyncio.Queue[tuple[T] | Exception | None]") -> None:
    """Items as 1-tuples, then None at the end or the error."""
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await queue.put((item,))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
