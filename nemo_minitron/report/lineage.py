"""The way from the teacher to a model: the stages that made it, in order, and the texts that they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.artifacts.store import Store
from nemo_minitron.stages.kind import Output
from nemo_minitron.stages.registry import STAGES

MODEL_ROLES = ("model", "student")
"""Input roles of the model that a stage changes or measures."""
TEXTS = {Output.TOKENIZED_TEXT, Output.CHAT_ROWS, Output.SAMPLED_ANSWERS}


class Record(Protocol):
    """A finished stage: its manifest, or its artifact."""

    @property
    def stage(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def result(self) -> Mapping[str, Any]: ...


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Lineage:
    """The stages that made a model, after its teacher."""

    model: str
    """Stage that made the model."""
    teacher: str
    """Stage that provides the teacher; what happened before it is not part of the lineage."""
    records: Mapping[str, Record] = field(default_factory=dict)
    """Every stage that the model depends on, by name; a stage comes after its inputs."""
    missing: tuple[str, ...] = ()
    """Stages that the model depends on and whose manifests are gone or belong to a later run of the stage."""

    @property
    def line(self) -> list[Record]:
        """The stages through which the weights went, the oldest first, without the teacher."""
        return line_of(self.model, self.records, end=self.teacher)

    def teacher_line(self, record: Record) -> list[Record]:
        """Return the stages that changed the teacher before a stage distilled from it."""
        return line_of(record.inputs.get("teacher"), self.records, end=self.teacher)

    def texts(self) -> dict[str, list[str]]:
        """Return source of text -> kinds of the stages that read it; measurements of models are left out."""
        out: dict[str, dict[str, None]] = {}
        for record in self.records.values():
            if Output.TEACHER_CHECK in _outputs(record):
                continue
            read = [self.records[name] for name, _ in _inputs_of(record) if name in self.records]
            found = [*record.result.get("data_sources", ()), *(s for text in read for s in self._sources(text))]
            for source in found:
                out.setdefault(str(source), {})[record.kind] = None
        return {source: list(kinds) for source, kinds in out.items()}

    def _sources(self, text: Record) -> list[str]:
        """Return the sources of a text, which may be derived from another text; empty for a stage that makes none."""
        if not TEXTS & _outputs(text):
            return []
        own = text.result.get("sources")
        if own:
            return [str(one["source"] if isinstance(one, Mapping) else one) for one in own]
        read = [self.records[name] for name, _ in _inputs_of(text) if name in self.records]
        return [source for other in read for source in self._sources(other)] or [f"stage {text.stage}"]


def line_of(stage: Any, records: Mapping[str, R], end: str | None = None) -> list[R]:
    """Return the stages through which the weights of a model went, the oldest first.

    Args:
        stage: the stage that made the model; None: there is none.
        records: the known stages by name; the line begins after the first one that is not known.
        end: the line begins after this stage.
    """
    out: list[R] = []
    while isinstance(stage, str) and stage != end and stage in records and all(stage != one.stage for one in out):
        out.append(records[stage])
        stage = next((out[-1].inputs[role] for role in MODEL_ROLES if role in out[-1].inputs), None)
    return out[::-1]


def read_lineage(model: str, fingerprint: str, teacher: str, store: Store) -> Lineage:
    """Read the manifests of all stages that a model depends on, back to its teacher.

    Args:
        model: stage that made the model.
        fingerprint: its fingerprint.
    """
    records: dict[str, Manifest] = {}
    seen: set[str] = set()
    missing: dict[str, None] = {}

    def visit(stage: str, expected: str | None) -> None:
        if stage == teacher or stage in seen:
            return
        seen.add(stage)
        manifest = store.manifest(stage)
        if manifest is None or expected not in (None, manifest.fingerprint):
            missing[stage] = None
            return
        for name, then in _inputs_of(manifest, manifest.payload.get("inputs", {})):
            visit(name, then)
        records[stage] = manifest

    visit(model, fingerprint)
    return Lineage(model, teacher, records, tuple(missing))


def _inputs_of(record: Record, fingerprints: Mapping[str, Any] = MappingProxyType({})) -> Iterator[tuple[str, Any]]:
    """Yield (stage, its fingerprint or None) of each input.

    Args:
        fingerprints: role -> fingerprint(s), in the form of the inputs.
    """
    for role, value in record.inputs.items():
        then = fingerprints.get(role)
        if isinstance(value, str):
            yield value, then
        else:
            named = value if isinstance(value, Mapping) else {name: name for name in value}
            yield from ((name, (then or {}).get(label)) for label, name in named.items())


def _outputs(record: Record) -> set[Output]:
    return set(STAGES[record.kind].outputs) if record.kind in STAGES else set()
