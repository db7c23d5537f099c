"""Reading and rendering held-out rows for an evaluation. This needs no model, so it is done before any training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import pair_row, read_normalized, sft_rows
from nemo_minitron.data.chat.rows import BadRow, Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.schema.chats import ChatEvaluation, ChatRendering, RowKind


@dataclass
class HeldOut:
    """Held-out rows that can be measured, and counts of those that cannot."""

    rows: list[Row] = field(default_factory=list)
    rendered: list[dict[str, Any]] = field(default_factory=list)
    """Rendered form of each of `rows`: the last answer of a conversation with its prompt, or a pair."""
    too_long: int = 0
    bad: BadRows = field(default_factory=BadRows)

    def facts(self) -> dict[str, Any]:
        """Return {rows: number read, measured_rows, too_long_rows, bad_rows, first_bad_rows}."""
        return {
            "rows": self.bad.num_rows,
            "measured_rows": len(self.rows),
            "too_long_rows": self.too_long,
            **self.bad.facts(),
        }

    def left_out(self) -> str:
        """Return a sentence on the rows that are left out."""
        reasons = [f"{self.too_long} too long"] * (self.too_long > 0)
        reasons += [f"{self.bad.num_bad} bad (the first: {self.bad.first[0]})"] if self.bad.num_bad else []
        num_left_out = self.bad.num_rows - len(self.rows)
        return f"{num_left_out} of {self.bad.num_rows} held-out rows are left out: {', '.join(reasons)}"


def read_heldout(
    folder: Path, rows: RowKind, template: ChatTemplate, params: ChatEvaluation, *, stage: str, where: str
) -> HeldOut:
    """Read and render the first `max_rows` held-out rows of a chat_data or annotate stage.

    Args:
        folder: folder of that stage.
        stage: name of that stage, for error messages.
        where: recipe key of the evaluation, for error messages.

    Raises:
        DataError: too many rows are bad, or there are none to measure.
    """
    found = HeldOut()
    for row in islice(read_normalized(folder / "valid.jsonl"), params.max_rows):
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
            f"Stage {stage} has no held-out rows.",
            where=f"{where}.inputs.chats = {stage}",
            next_step="Raise valid_rows of the chat_data stage.",
        )
    if not found.rows:
        raise _no_rows_error(found, folder, rows, template, params, where)
    return found


def _options(params: ChatEvaluation) -> ChatRendering:
    return ChatRendering(turns="last", max_seq_len_tokens=params.max_seq_len_tokens, condition_on_attributes=False)


def _rendered(row: Row, rows: RowKind, template: ChatTemplate, options: ChatRendering) -> dict[str, Any] | None:
    """Render one row; return None if it is too long."""
    if rows == "pairs":
        return pair_row(row, template, options)
    return next(iter(sft_rows(row, template, options)), None)


def _no_rows_error(
    found: HeldOut, folder: Path, rows: RowKind, template: ChatTemplate, params: ChatEvaluation, where: str
) -> DataError:
    if not found.too_long:
        return found.bad.none_left(where)
    fitting = found.bad.num_rows - found.bad.num_bad
    needed = _shortest(islice(read_normalized(folder / "valid.jsonl"), params.max_rows), rows, template, params)
    return DataError(
        f"0 of {fitting} held-out rows fit into max_seq_len_tokens = {params.max_seq_len_tokens}; "
        f"the shortest has {needed} tokens.",
        where=f"{where}.max_seq_len_tokens",
        next_step=f"Raise it to at least {needed}, or choose shorter rows.",
    )


def _shortest(rows: Iterable[Row], kind: RowKind, template: ChatTemplate, params: ChatEvaluation) -> int:
    """Return the number of tokens of the shortest row; a pair counts with its longer answer."""
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
