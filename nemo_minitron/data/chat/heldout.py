"""Held-out rows as an evaluation reads them. They are rendered before any model is loaded, let alone trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import pair_row, read_normalised, sft_rows
from nemo_minitron.data.chat.rows import BadRow, Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.schema.chats import ChatEvaluation, ChatRendering, RowKind


@dataclass
class HeldOut:
    """The rows that can be measured, and how many could not."""

    rows: list[Row] = field(default_factory=list)
    rendered: list[dict[str, Any]] = field(default_factory=list)
    """One for each of `rows`: the last answer of a conversation with what precedes it, or a pair."""
    too_long: int = 0
    bad: BadRows = field(default_factory=BadRows)

    def facts(self) -> dict[str, Any]:
        """{rows: looked at, measured_rows, too_long_rows, bad_rows, first_bad_rows}."""
        return {
            "rows": self.bad.num_rows,
            "measured_rows": len(self.rows),
            "too_long_rows": self.too_long,
            **self.bad.facts(),
        }

    def left_out(self) -> str:
        """A sentence on the rows that are left out."""
        reasons = [f"{self.too_long} too long"] * (self.too_long > 0)
        reasons += [f"{self.bad.num_bad} bad (the first: {self.bad.first[0]})"] if self.bad.num_bad else []
        num_left_out = self.bad.num_rows - len(self.rows)
        return f"{num_left_out} of {self.bad.num_rows} held-out rows are left out: {', '.join(reasons)}"


def read_heldout(
    folder: Path, rows: RowKind, template: ChatTemplate, params: ChatEvaluation, *, stage: str, where: str
) -> HeldOut:
    """The first `max_rows` held-out rows of a chat_data or annotate stage, rendered.

    Args:
        folder: of the stage that holds the rows.
        stage: its name, for messages.
        where: the recipe's key of the evaluation.

    Raises:
        DataError: too many bad rows, or none left to measure.
    """
    found = HeldOut()
    for row in islice(read_normalised(folder / "valid.jsonl"), params.max_rows):
        found.bad.num_rows += 1
        try:
            rendered = _rendered(row, rows, template, _options(params))
        except BadRow as reason:
            found.bad.add(row["origin"], reason)
            continue
        if rendered is None:
            found.too_long += 1
        else:
            found.rows.append(row)
            found.rendered.append(rendered)
    found.bad.require_few(params.max_bad_fraction, where)
    if found.bad.num_rows == 0:
        raise DataError(
            f"Stage {stage} holds no held-out rows.",
            where=f"{where}.inputs.chats = {stage}",
            next_step="Raise valid_rows of the chat_data stage.",
        )
    if not found.rows:
        raise _nothing_left(found, folder, rows, template, params, where)
    return found


def _options(params: ChatEvaluation) -> ChatRendering:
    return ChatRendering(turns="last", max_seq_len_tokens=params.max_seq_len_tokens, condition_on_attributes=False)


def _rendered(row: Row, rows: RowKind, template: ChatTemplate, options: ChatRendering) -> dict[str, Any] | None:
    """None: too long."""
    if rows == "pairs":
        return pair_row(row, template, options)
    return next(iter(sft_rows(row, template, options)), None)


def _nothing_left(
    found: HeldOut, folder: Path, rows: RowKind, template: ChatTemplate, params: ChatEvaluation, where: str
) -> DataError:
    if not found.too_long:
        return found.bad.none_left(where)
    fitting = found.bad.num_rows - found.bad.num_bad
    needed = _shortest(islice(read_normalised(folder / "valid.jsonl"), params.max_rows), rows, template, params)
    return DataError(
        f"0 of {fitting} held-out rows fit into max_seq_len_tokens = {params.max_seq_len_tokens}; "
        f"the shortest has {needed} tokens.",
        where=f"{where}.max_seq_len_tokens",
        next_step=f"Raise it to {needed} at the least, or choose shorter rows.",
    )


def _shortest(rows: Iterable[Row], kind: RowKind, template: ChatTemplate, params: ChatEvaluation) -> int:
    """Tokens of the shortest row; of a pair, with its longer answer."""
    options = _options(params).model_copy(update={"max_seq_len_tokens": None})
    sizes = []
    for row in rows:
        stats = LengthStats()
        try:
            (pair_row if kind == "pairs" else sft_rows)(row, template, options, stats)
        except BadRow:
            continue
        sizes.append(max(stats.sequence_tokens))
    return min(sizes)
