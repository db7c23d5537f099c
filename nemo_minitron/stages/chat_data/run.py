"""Convert public chat, preference and rating data into checked rows for training and validation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.fields import Fields
from nemo_minitron.data.chat.files import RawRow, read_rows
from nemo_minitron.data.chat.formats import FORMATS, FORMATS_OF, detect
from nemo_minitron.data.chat.rows import ATTRIBUTES, BadRow, Row, question, with_system
from nemo_minitron.data.chat.split import copies, heldout_questions, text_hash
from nemo_minitron.data.found import CHAT_FORMATS
from nemo_minitron.errors import DataError
from nemo_minitron.schema.chats import ChatSource
from nemo_minitron.stages.chat_data.params import ChatDataStage
from nemo_minitron.stages.common.source_files import files_of
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.typed_inputs import NoInputs
from nemo_minitron.system.shown import shown_names

SPLITS = ("train", "valid")
_LISTED_FIELDS = 20


@dataclass
class _Collected:
    """Statistics of the first pass over all sources."""

    file: Path
    """The valid rows, until they are split."""
    bad: BadRows = field(default_factory=BadRows)
    questions: Counter[int] = field(default_factory=Counter)
    """Hash of a question -> number of its rows."""
    ratings: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ATTRIBUTES})
    sources: list[dict[str, Any]] = field(default_factory=list)


def chat_data(params: ChatDataStage, inputs: NoInputs, ctx: StageContext) -> Result:
    """Read, check and split every source. Only a hash of each question is kept in memory, not the rows.

    Write train.jsonl, valid.jsonl, facts.json and, if rows were skipped, bad_rows.jsonl.

    Raises:
        DataError: a file cannot be read, too many rows are invalid, or one of the two splits would be empty.
    """
    found = _Collected(ctx.work_dir / "rows.jsonl")
    _collect(params, ctx, found)
    found.bad.require_few(params.max_bad_fraction, f"stages.{ctx.name}")
    if not found.questions:
        raise found.bad.none_left(f"stages.{ctx.name}")
    counts = _split(params, found, ctx.out_dir)
    _require_both(params, counts, sum(found.questions.values()), ctx.name)
    rated = {name: values for name, values in found.ratings.items() if values}
    facts = {
        "rows": params.rows,
        **{f"{split}_rows": counts[split] for split in SPLITS},
        "bad_rows": found.bad.num_bad,
        "num_questions": len(found.questions),
        "attributes": {name: {"rows": len(v), "mean": sum(v) / len(v)} for name, v in rated.items()},
        "sources": found.sources,
    }
    (ctx.out_dir / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _collect(params: ChatDataStage, ctx: StageContext, found: _Collected) -> None:
    bad_file = ctx.out_dir / "bad_rows.jsonl"
    # File names can contain bytes that are not UTF-8; in JSON, the escaped form has the same meaning.
    text = partial(Path.open, mode="w", encoding="utf-8", errors="backslashreplace")
    with text(found.file) as good, text(bad_file) as bad:
        for number, source in enumerate(params.sources):
            found.sources.append(_collect_source(params, number, source, ctx, found, good, bad))
    if found.bad.num_bad == 0:
        bad_file.unlink()


def _collect_source(
    params: ChatDataStage,
    number: int,
    source: ChatSource,
    ctx: StageContext,
    found: _Collected,
    good: IO[str],
    bad: IO[str],
) -> dict[str, Any]:
    """Read and check the rows of one source, and return facts about it."""
    num_rows, bad_before = 0, found.bad.num_bad
    unused: Counter[str] = Counter()
    name: str | None = None if source.format == "auto" else source.format
    files = files_of(source.source, ctx, CHAT_FORMATS)
    for raw in _rows(files, source.source, ctx):
        found.bad.num_rows += 1
        try:
            if name is None:
                name = _detected(raw, params, source, number, ctx)
            row, left = _adapted(raw, name, source)
            row = with_system(row, params.system)
        except BadRow as reason:
            found.bad.add(raw.where, reason)
            bad.write(_line({"origin": raw.origin, "source": source.source, "reason": str(reason)}))
            continue
        key = text_hash(params.seed, question(row))
        found.questions[key] += 1
        for attribute, value in row.get("attributes", {}).items():
            found.ratings[attribute].append(value)
        good.write(f"{number}\t{key}\t{text_hash(params.seed, _line(row))}\t{_line({**row, 'origin': raw.origin})}")
        unused.update(left)
        num_rows += 1
        if num_rows == source.max_rows:
            break
    _report_unused(unused, source.source, ctx)
    return {
        "source": source.source,
        "format": name,
        "rows": num_rows,
        "bad_rows": found.bad.num_bad - bad_before,
        "weight": source.weight,
        "unused_fields": dict(unused.most_common(_LISTED_FIELDS)),
    }


def _report_unused(unused: Counter[str], source: str, ctx: StageContext) -> None:
    if unused:
        listed = [f"{field} ({count:,})" for field, count in unused.most_common(_LISTED_FIELDS)]
        more = [f"and {len(unused) - len(listed)} more"] if len(unused) > len(listed) else []
        ctx.progress.say(f"{source}: unused fields (number of rows): {', '.join([*listed, *more])}")


def _rows(files: list[Path], source: str, ctx: StageContext) -> Iterator[RawRow]:
    count = 0
    with ctx.progress.bar(f"read {source}", len(files), "files") as bar:
        for file in files:
            for raw in read_rows(file):
                yield raw
                count += 1
                bar.advance(0, rows=count)
            bar.advance(1)


def _detected(raw: RawRow, params: ChatDataStage, source: ChatSource, number: int, ctx: StageContext) -> str:
    """Detect the format from the first readable row, and show it."""
    if isinstance(raw.content, BadRow):
        raise raw.content
    try:
        name = detect(_without_left_out(raw.content, source), params.rows)
    except BadRow as error:
        raise DataError(
            f"The format cannot be detected: {error}.",
            where=raw.where,
            allowed=f"with rows = {params.rows}: {', '.join(FORMATS_OF[params.rows])}",
            next_step=f"Set stages.{ctx.name}.sources.{number}.format, or convert the rows to one of these formats.",
        ) from error
    ctx.progress.say(f"{source.source}: read as {name} (its first row has {shown_names(raw.content)})")
    return name


def _adapted(raw: RawRow, name: str, source: ChatSource) -> tuple[Row, list[str]]:
    """Return the checked row and the names of the fields that were not used."""
    if isinstance(raw.content, BadRow):
        raise raw.content
    fields = Fields(raw.content, source.leave_out)
    return FORMATS[name].read(fields, source.attributes), fields.unread()


def _without_left_out(content: Mapping[str, Any], source: ChatSource) -> Mapping[str, Any]:
    return {key: value for key, value in content.items() if key not in source.leave_out}


def _split(params: ChatDataStage, found: _Collected, folder: Path) -> Counter[str]:
    """Write the rows to both splits, and return the number of rows of each."""
    heldout = heldout_questions(found.questions, params.valid_rows)
    counts: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
    with ExitStack() as stack:
        files = {s: stack.enter_context((folder / f"{s}.jsonl").open("w", encoding="utf-8")) for s in SPLITS}
        for line in stack.enter_context(found.file.open(encoding="utf-8")):
            number, key, content, row = line.split("\t", 3)
            split = "valid" if int(key) in heldout else "train"
            weight = params.sources[int(number)].weight if split == "train" else 1.0
            times = copies(weight, int(content))
            files[split].write(row * times)
            counts[split] += times
    return counts


def _require_both(params: ChatDataStage, counts: Counter[str], total: int, stage: str) -> None:
    if counts["train"] and (counts["valid"] or params.valid_rows == 0):
        return
    split = "validation" if counts["train"] else "training"
    raise DataError(
        f"None of {total} valid rows is left for {split}.",
        where=f"stages.{stage}.valid_rows = {params.valid_rows}",
        allowed="at least two different first questions, because all rows of a question go into the same split",
        next_step="Change valid_rows, or add rows.",
    )


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
