"""A run over all prompts: one record a prompt, written as soon as it is measured, then the document of all."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pycircuit.files.atomic import write_text
from pycircuit.model import ReplacementModel
from pycircuit.ops.processor import processor_name
from pycircuit.progress import Progress, Report
from pycircuit.trace import attribute
from pycircuit.trace.checkpoint import digest

from .baselines import NeuronTranscoders, answer_gradient, feature_gradients, neuron_graph, random_transcoders
from .behaviours import PROMPTS, Behaviour, Question, answered
from .circuit_tests import circuits_of, outcomes
from .measured_effects import SOURCES, effects, sources_of
from .summary import summarize

OP = "benchmark-truth"
NEURONS, RANDOM = "neurons", "random"
ROWS, NEURON_ROWS = 2048, 512  # features, and neurons, of a graph that get a row


@dataclass(frozen=True)
class TruthRun:
    """Settings of a run. sets: models by the name of their transcoders; out: the document to be, JSON."""

    name: str
    sets: dict[str, ReplacementModel]
    behaviours: Sequence[Behaviour]
    out: Path
    prompts: int = PROMPTS
    rows: int = ROWS
    neuron_rows: int = NEURON_ROWS
    sources: int = SOURCES

    @property
    def partial(self) -> Path:
        """Path of the records so far, removed at the end."""
        return self.out.with_name(f"{self.out.name}l")

    def settings(self) -> dict[str, Any]:
        """Everything that a record depends on."""
        digests = {name: digest(*[w for w in m.transcoders.w_enc if w is not None]) for name, m in self.sets.items()}
        sizes = {name: getattr(self, name) for name in ("prompts", "rows", "neuron_rows", "sources")}
        return {"model": self.name, "transcoders": digests, **sizes}

    def run(self, progress: bool | Report = True) -> dict[str, Any]:
        """Measure every prompt that has no record yet, and write and return the document."""
        line = Progress(progress)
        settings = self.settings()
        records = self._earlier(settings)
        model = next(iter(self.sets.values()))
        questions = answered(model, self.behaviours, self.prompts, progress)
        sets = {**self.sets, RANDOM: self._random(model, questions)}
        with self.partial.open("a", encoding="utf-8") as file:
            if not file.tell():
                _append(file, settings)
            for i, question in enumerate(questions):
                line.step("prompts", i, len(questions), "prompts")
                if question.prompt not in records:
                    records[question.prompt] = self._record(sets, question)
                    _append(file, records[question.prompt])
        line.close()
        document = self._document(settings, [records[question.prompt] for question in questions])
        write_text(OP, self.out, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        self.partial.unlink()
        return document

    def _earlier(self, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Records by prompt of a run that was stopped; a line that was cut off is dropped from the file."""
        if not self.partial.exists():
            return {}
        complete = [text for text in self.partial.read_text(encoding="utf-8").split("\n")[:-1] if text]
        lines = [json.loads(text) for text in complete]
        if lines and lines[0] != settings:
            raise ValueError(
                f"{OP}: {self.partial} must be of a run with the same settings, got {_difference(lines[0], settings)}; "
                "remove it or write another document"
            )
        write_text(OP, self.partial, "".join(f"{text}\n" for text in complete))
        return {record["prompt"]: record for record in lines[1:]}

    def _random(self, model: ReplacementModel, questions: Sequence[Question]) -> ReplacementModel:
        """Random transcoders, as many active at a token as the first set's are on these prompts."""
        active = model.activations([question.prompt for question in questions])
        tokens = sum(layers[0].positions - model.ignore_positions for layers in active)
        counts = [sum(layers[i].count for layers in active) / tokens for i in range(model.depth)]
        transcoders = random_transcoders(model.transcoders, counts)
        return ReplacementModel(model.hf_model, transcoders, model.tokenizer, model.ignore_positions)

    def _record(self, sets: dict[str, ReplacementModel], question: Question) -> dict[str, Any]:
        """Everything that is measured on one prompt, by the name of the transcoders."""
        begin, seed = time.process_time(), zlib.crc32(question.prompt.encode())
        result: dict[str, Any] = {}
        size: int | None = None  # of the first set's circuit
        for name, model in sets.items():
            graph = attribute(
                model,
                question.prompt,
                targets=[question.token],
                max_features=self.rows,
                labels=False,
                progress=False,
            )
            result[name] = _measured(model, graph, question, seed, size, self.sources)
            size = size or result[name]["outcomes"]["sizes"]["pruned"]
        if self.neuron_rows:
            model = next(iter(sets.values()))
            own, graph = neuron_graph(model, question.prompt, question.token, self.neuron_rows)
            result[NEURONS] = _measured(own, graph, question, seed, size, self.sources)
        seconds = round(time.process_time() - begin, 2)
        return {**question._asdict(), "processor_seconds": seconds, "sets": result}

    def _document(self, settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = sum(record["processor_seconds"] for record in records)
        machine = {"processor": processor_name(), "threads": torch.get_num_threads()}
        return {**settings, "machine": machine, "processor_minutes": round(seconds / 60, 1), **summarize(records)}


def _measured(
    model: ReplacementModel, graph: Any, question: Question, seed: int, size: int | None, sources: int
) -> dict[str, Any]:
    """Scores, effects and outcomes of one graph."""
    is_exact = isinstance(model.transcoders, NeuronTranscoders)
    gradient = feature_gradients(model, graph, answer_gradient(model, question.prompt, question.token))
    pruned = graph.prune()
    replacement, completeness = graph.scores()
    circuits = circuits_of(pruned, gradient, size, seed)
    return {
        "replacement": replacement,
        "completeness": completeness,
        "certificate": graph.certificate,
        "active": graph.first_error,
        "outcomes": outcomes(model, graph, question.token, circuits),
        "effects": effects(model, graph, sources_of(pruned, seed, sources), gradient, is_exact=is_exact),
    }


def _append(file: Any, value: Any) -> None:
    """Append a line that stays whatever stops the process."""
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name)} against {ours.get(name)}" for name in names)
