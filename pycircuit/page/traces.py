"""Answers about traces: estimates, new traces, their progress and their end."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycircuit.graph import Graph
from pycircuit.interventions import attribute_changed
from pycircuit.trace import attribute, estimate

from .change_request import ChangeRequest
from .event_stream import event_stream
from .graph_folder import GraphFolder
from .served_model import ServedModel
from .trace_request import TraceRequest
from .tracing_queue import TraceJob, TracingQueue

_LONGEST_NAME = 60


class Traces:
    """The queue of a model's traces, whose graphs go into the folder."""

    def __init__(self, served: ServedModel, folder: GraphFolder) -> None:
        self.served, self.folder = served, folder
        self.queue = TracingQueue(self._trace, self._save)
        self._naming = threading.Lock()

    def estimate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return bytes and seconds of a trace."""
        request = TraceRequest.of(body)
        result = estimate(self.served.model, request.prompt, progress=False, **request.arguments)
        return {
            "bytes": result.bytes, "seconds": result.seconds, "positions": result.positions,
            "features": result.features, "rows": result.rows, "text": str(result),
        }  # fmt: skip

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Put a trace into the queue, once its prompt is known to be possible."""
        request = TraceRequest.of(body)
        self.served.model.tokens(request.prompt)
        return describe(self.queue.submit(request))

    def submit_after(self, name: str, graph: Graph, body: dict[str, Any]) -> dict[str, Any]:
        """Put the trace of a graph's prompt under the changes of a body into the queue."""
        if not self.served.may_be_of(graph):
            raise ValueError("page: graph must be of the served model, got one of another")
        interventions = tuple(change.intervention() for change in ChangeRequest.of(graph, body).changes)
        return describe(self.queue.submit(TraceRequest.after(graph, interventions, Path(name).stem)))

    def stream(self, identifier: str) -> Any:
        """Return the stream of a trace's events."""
        return event_stream(self.queue.job(identifier))

    def cancel(self, identifier: str) -> dict[str, Any]:
        """Cancel a trace."""
        return describe(self.queue.cancel(identifier))

    def listing(self) -> list[dict[str, Any]]:
        """Describe the traces that wait, run, and ended last."""
        return [describe(job) for job in self.queue.jobs()]

    def _trace(self, request: TraceRequest, report: Callable[[str, int, int], None]) -> Graph:
        if request.interventions:
            return attribute_changed(
                self.served.model, request.prompt, request.interventions, progress=report, **request.arguments
            )
        return attribute(self.served.model, request.prompt, progress=report, **request.arguments)

    def _save(self, request: TraceRequest, graph: Graph) -> str:
        with self._naming:
            path = _free_path(self.folder.path, request.name or _name_of(graph.prompt))
            graph.save(path)
        return path.name


def describe(job: TraceJob) -> dict[str, Any]:
    """Describe a trace."""
    prompt = job.request.prompt
    return {"id": job.id, "state": job.state, "prompt": prompt if isinstance(prompt, str) else "", "event": job.event}


def _name_of(prompt: str) -> str:
    """Name of a prompt's file: its words, without the opening token."""
    words = re.sub(r"<[^<>\s]*>", " ", prompt).casefold()
    name = re.sub(r"[\W_]+", "-", words).strip("-")
    return name[:_LONGEST_NAME].rstrip("-") or "graph"


def _free_path(folder: Path, name: str) -> Path:
    path, number = folder / f"{name}.safetensors", 2
    while path.exists() or path.is_symlink():
        path, number = folder / f"{name}-{number}.safetensors", number + 1
    return path
