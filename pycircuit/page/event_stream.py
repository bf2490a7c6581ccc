"""Server-sent events of a trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from .json_bytes import encoded
from .tracing_queue import TraceJob

_STEP = 0.1  # seconds between two looks at the trace
_SILENCE = 15.0  # seconds after which a comment keeps the connection open


def event_stream(job: TraceJob) -> StreamingResponse:
    """Return the answer that streams the newest event of a trace whenever there is a new one, to its end."""
    return StreamingResponse(_events(job), headers={"cache-control": "no-store"}, media_type="text/event-stream")


async def _events(job: TraceJob) -> AsyncIterator[bytes]:
    seen, silent = -1, 0.0
    while True:
        ended, changes, event = job.ended, job.changes, job.event
        if changes != seen:
            seen, silent = changes, 0.0
            yield b"data: " + encoded(event) + b"\n\n"
        if ended:
            return
        await asyncio.sleep(_STEP)
        silent += _STEP
        if silent >= _SILENCE:
            silent = 0.0
            yield b": the trace goes on\n\n"
