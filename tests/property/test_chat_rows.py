"""The texts of random rows and files are kept or reported as unused, or the row is bad with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.data.chat.fields import Fields, is_empty
from nemo_minitron.data.chat.files import read_rows
from nemo_minitron.data.chat.formats import FORMATS, FORMATS_OF
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.errors import MinitronError
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.chat_data.params import ChatDataStage
from nemo_minitron.stages.chat_data.run import chat_data
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.typed_inputs import NoInputs
from nemo_minitron.system.progress import Progress
from tests.support.examples import budget

TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=12),  # also halves of surrogate pairs, and NUL
    st.sampled_from(["Hi", "Ho", "4 #### 4", "\n\nHuman: Hi\n\nAssistant: Ho", "helpfulness:3", "[{'role': 'user'}]"]),
)
WORDS = st.text(st.sampled_from("abc 4#\n<é"), min_size=1, max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
ROLES = st.sampled_from(["user", "human", "assistant", "gpt", "system", "developer", "tool", "Function_call", " User "])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": VALUES}))
MORE = {
    name: VALUES
    for name in ("tool_calls", "reasoning_content", "thinking", "weight", "train", "prefix", "label", "name")
}
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS | PARTS | VALUES}, optional=MORE),
    st.fixed_dictionaries({"from": ROLES, "value": TEXTS}, optional=MORE),
)
DIALOGUES = st.builds(
    lambda turns, more: [
        {"role": ("user", "assistant")[i % 2], "content": text, **extra}
        for i, (text, extra) in enumerate(zip(turns, more, strict=False))
    ],
    st.lists(WORDS, min_size=2, max_size=4),
    st.lists(st.just({}) | st.dictionaries(st.sampled_from(sorted(MORE)), TEXTS, max_size=1), min_size=4, max_size=4),
)
TURNS = DIALOGUES | st.lists(MESSAGES, max_size=4)
SAID = TEXTS | TURNS | TURNS.map(json.dumps) | MESSAGES | VALUES
NAMES = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "instruction",
    "input",
    "question",
    "completion",
    "output",
    "response",
    "answer",
    "chosen",
    "chosen_response",
    "rejected",
    "rejected_response",
    "context",
    "system",
    "history",
    "tools",
    "images",
    "reasoning_content",
    "text",
    "id",
)
RATED = ("attributes", "labels", "mask", "quality", "helpfulness", "chosen_reward", "rejected_reward", "stars")
FORMS = {
    ("messages",): ("messages", "oasst"),
    ("conversations",): ("sharegpt",),
    ("prompt", "completion"): ("prompt_completion",),
    ("instruction", "input", "output"): ("prompt_completion",),
    ("question", "answer"): ("gsm8k", "worked_answers", "result_place", "result_first", "prompt_completion"),
    ("prompt", "chosen", "rejected"): ("pairs", "chosen_answers", "rejected_answers"),
    ("chosen", "rejected"): ("hh", "pairs"),
    ("prompt", "response"): ("helpsteer", "prompt_completion"),
}
EXTRAS = st.dictionaries(st.sampled_from([*NAMES, *RATED]), SAID, max_size=2) | st.just({})


def _fitting(form: tuple[str, ...], formats: tuple[str, ...]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Generate (format, row) where the row has the fields of the format, usually with valid texts."""
    spoken = DIALOGUES | TURNS if form[0] in ("messages", "conversations") else WORDS | SAID
    if form == ("chosen", "rejected"):
        spoken = st.sampled_from(["", "\n\nHuman: Hi\n\nAssistant: "]).flatmap(lambda start: WORDS.map(start.__add__))
    row = st.builds(lambda extras, row: {**extras, **row}, EXTRAS, st.fixed_dictionaries(dict.fromkeys(form, spoken)))
    return st.tuples(st.sampled_from(formats), row)


CASES = st.one_of(
    *(_fitting(form, formats) for form, formats in FORMS.items()),
    st.tuples(st.sampled_from(sorted(FORMATS)), st.dictionaries(TEXTS, VALUES, max_size=4)),
)
ROWS = CASES.map(lambda case: case[1])


def _words(value: Any) -> Iterator[str]:
    """Yield every text in a value, including those in JSON texts."""
    if isinstance(value, str):
        try:
            inside = json.loads(value)
        except (ValueError, RecursionError):
            inside = value
        yield from [value] if isinstance(inside, str | int | float | None) else _words(inside)
    elif isinstance(value, dict):
        yield from (word for each in value.values() for word in _words(each))
    elif isinstance(value, list):
        yield from (word for each in value for word in _words(each))


def _squeezed(text: str) -> str:
    return re.sub(r"<<[-+*/().,%$\d ]+=[-+*/().,%$\d =]*>>|\s+", "", text)


NOT_TEXT = ("role", "from", "type", "label", "labels", "mask", "attributes", "weight", "train", "prefix")
"""Names of fields whose texts are not part of the conversation."""


def _conversation_texts(value: Any, skip: tuple[str, ...], kept: str) -> Iterator[str]:
    """Yield the texts of the conversation: those in fields that are neither skipped nor in NOT_TEXT.

    JSON in a text is parsed, unless it was kept unchanged.
    """
    if isinstance(value, str) and _squeezed(value) in kept:
        return
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict):
        for name, each in value.items():
            if name not in skip and name not in NOT_TEXT and not is_empty(each):
                yield from _conversation_texts(each, skip, kept)
    elif isinstance(value, list):
        yield from (word for each in value for word in _conversation_texts(each, skip, kept))
    elif isinstance(value, str):
        yield value


@budget(100)
@given(case=CASES, renames=st.sampled_from([{}, {"stars": "quality"}]))
def test_a_row_keeps_its_texts_or_gives_a_reason(
    case: tuple[str, dict[str, Any]], renames: dict[str, str | None]
) -> None:
    name, row = case
    fields = Fields(row)
    try:
        found = FORMATS[name].read(fields, renames)
    except BadRow as error:
        reason = str(error)
    else:
        reason = None
    if reason is not None:
        assert 0 < len(reason) < 700
        return
    unused = tuple(field.rpartition(".")[2] for field in fields.unread())
    if name in ("chosen_answers", "rejected_answers"):
        unused += ("chosen", "rejected", "chosen_response", "rejected_response", "answer")
    kept = _squeezed("\0".join(_words(found)))
    for text in _conversation_texts(row, unused, kept):
        for part in re.split(r"(?:^|\n\n)(?:Human|Assistant): ?", text):
            assert _squeezed(part) in kept, (text, found, unused)
    json.dumps(found, ensure_ascii=False).encode()


FILES = st.one_of(
    st.binary(max_size=60),
    st.lists(ROWS, max_size=2).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(ROWS, max_size=2).map(lambda rows: json.dumps(rows, indent=1).encode()),
    st.builds(
        lambda row, at, junk: json.dumps(row).encode()[:at] + junk,
        ROWS,
        st.integers(0, 80),
        st.sampled_from([b"", b"\xff", b"\r\n", b"\0", b"\n{}", b'{"a":1,"a":2}', b"[" * 3000, b"1" * 5000]),
    ),
)


@budget(60)
@given(content=FILES, ending=st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"]))
def test_any_bytes_are_rows_or_an_error_that_names_the_file(content: bytes, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    file.write_bytes(content)
    message = str(file)
    try:
        for raw in read_rows(file):
            assert raw.number > 0
            assert isinstance(raw.content, BadRow | dict)
    except MinitronError as error:
        message = str(error)
    assert str(file) in message


@budget(40)
@given(content=FILES, rows=st.sampled_from([*FORMATS_OF]), format=st.sampled_from(["auto", *FORMATS]))
def test_the_stage_keeps_rows_or_gives_an_error(content: bytes, rows: Any, format: Any, tmp_path: Path) -> None:
    file, out, work = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "work"
    out.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = {"source": str(file), "format": format}
    stage = ChatDataStage(kind="chat_data", rows=rows, valid_rows=0, sources=[source], max_bad_fraction=1.0)
    if format != "auto" and FORMATS[format].rows != rows:
        return
    message = ""
    try:
        facts = chat_data(stage, NoInputs(), StageContext("chats", "r", out, work, Execution(), Progress(silent=True)))
    except MinitronError as error:
        message = str(error)
    if message:
        assert str(file) in message or "stages.chats" in message
    else:
        kept = [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").split("\n") if line]
        assert len(kept) == facts["train_rows"] > 0
