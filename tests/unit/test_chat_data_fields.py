"""Tests of fields other than texts in rows and messages: kept, refused by name, or counted as unused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_minitron.data.chat.fields import Fields
from nemo_minitron.data.chat.files import read_rows
from nemo_minitron.data.chat.formats import FORMATS, detect
from nemo_minitron.data.chat.render import sft_rows
from nemo_minitron.data.chat.rows import BadRow, with_system
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from tests.unit.test_chat_data_stage import prepare, write

Row = dict[str, Any]
USER: Row = {"role": "user", "content": "Hi"}
SYSTEM: Row = {"role": "system", "content": "Be kind."}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]


def answered(content: Any = "Ho", **more: Any) -> Row:
    return {"messages": [USER, {"role": "assistant", "content": content, **more}]}


def read(row: Row, kind: Any = "conversations", leave_out: tuple[str, ...] = ()) -> tuple[Row, list[str]]:
    """Return (checked row, unused fields)."""
    fields = Fields(row, leave_out)
    return FORMATS[detect(fields.content, kind)].read(fields, {}), fields.unread()


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (answered("Let me look.", tool_calls=CALL), "message 2 has tool_calls, which is not supported"),
        (answered(None, tool_calls=CALL), "message 2 has tool_calls"),
        (answered(function_call={"name": "f"}), "message 2 has function_call"),
        ({**answered(), "tools": CALL}, "the row has tools, which is not supported"),
        ({**answered(), "tools": json.dumps(CALL)}, "set `leave_out: [tools]` of the source to drop it"),
        ({**answered(), "images": ["a.png"]}, "the row has images"),
        ({"messages": [USER, {"role": "tool", "content": "4"}]}, "message 2 has the role 'tool'"),
        (answered(weight=0), "message 2 has weight = 0, but every answer is trained on"),
        (answered(train=False), "message 2 has train = False"),
        (answered(prefix=True), "message 2 is marked as a prefix"),
        (answered([{"type": "image_url"}]), "message 2 has a part of type 'image_url'; only text is supported"),
        (answered([{"type": "text", "text": None}]), "message 2 has a part whose text is None"),
        (answered(3), "message 2 has 3 in place of text"),
        (answered(reasoning=["a"]), "message 2 has reasoning that is ['a'], not text"),
        ({"conversations": [USER, answered()["messages"][1]], "mask": "Assistant"}, "mask is 'Assistant'"),
        (
            {**answered(), "quality": 3, "attributes": {"quality": 4}},
            "quality is 3 in the row, but 4 in its attributes",
        ),
        ({**answered(), "labels": {"name": ["quality", "humor"], "value": [1]}}, "labels has 2 names and 1 values"),
        ({**answered(), "labels": {"name": [["quality"]], "value": [1]}}, "not one value for each text name"),
        ({**answered(), "quality": 10**400}, "attribute quality is"),
        ({"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "is a Python list of messages written as text"),
        ({"prompt": "Hi", "output": "Ho", "history": ["Q"]}, "history is ['Q'], not a list of [question, answer]"),
        (
            {**answered(), "system": "S", "messages": [{"role": "system", "content": "T"}, *answered()["messages"]]},
            "differs",
        ),
    ],
)
def test_unsupported_fields_make_a_row_bad(row: Row, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(row)
    assert reason in str(caught.value)


def test_pairs_do_not_support_reasoning() -> None:
    pair = {"chosen": [USER, answered(reasoning_content="R")["messages"][1]], "rejected": answered("No")["messages"]}
    with pytest.raises(BadRow, match="chosen has reasoning_content, which pairs do not support"):
        read(pair, "pairs")


def test_fields_left_out_by_the_recipe_are_neither_refused_nor_counted() -> None:
    row = {**answered("Let me look.", tool_calls=CALL, id=1), "tools": CALL, "id": 7}
    found = read(row, leave_out=("tools", "tool_calls", "id", "content"))
    assert found == (answered("Let me look."), [])


# --- kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_one_name(name: str) -> None:
    assert read(answered(**{name: " because "})) == (answered(reasoning_content="because"), [])
    assert read({"prompt": "Hi", "completion": "Ho", name: "because"})[0] == answered(reasoning_content="because")


@pytest.mark.parametrize(
    ("row", "carried"),
    [
        (answered(tool_calls=[], function_call=None, weight=1, train=True, reasoning_content=""), answered()),
        ({**answered(), "tools": "[]", "images": None}, answered()),
        ({"messages": json.dumps(answered()["messages"])}, answered()),
        ({"prompt": json.dumps([USER]), "completion": "Ho"}, answered()),
        (
            {"prompt": '{"a": 1}', "completion": "Ho"},
            {"messages": [{**USER, "content": '{"a": 1}'}, *answered()["messages"][1:]]},
        ),
        ({**answered(), "system": "S"}, with_system(answered(), "S")),
        ({"messages": [{"role": "developer", "content": "S"}, *answered()["messages"]]}, with_system(answered(), "S")),
        (
            {"prompt": None, "instruction": "Add.", "input": "1 2", "output": "3"},
            {"messages": [{**USER, "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]},
        ),
        ({"prompt": "Hi", "output": "Ho", "history": [["Hi", "Ho"]]}, {"messages": answered()["messages"] * 2}),
        (
            {"question": "Q?", "answer": "A", "context": "A text."},
            {"messages": [{**USER, "content": "A text.\n\nQ?"}, {"role": "assistant", "content": "A"}]},
        ),
    ],
)
def test_supported_fields_are_kept(row: Row, carried: Row) -> None:
    assert read(row) == (carried, [])


def test_pairs_keep_their_input_and_conversation() -> None:
    alpaca = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    assert read(alpaca, "pairs")[0]["prompt"] == [{**USER, "content": "Add.\n\n1 2"}]
    sharegpt = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Y"},
        "rejected": "N",
    }
    assert read(sharegpt, "pairs") == ({"prompt": [USER], "chosen": "Y", "rejected": "N"}, [])


# --- counted ------------------------------------------------------------------------------------


def test_other_fields_are_named() -> None:
    found, unused = read({**answered(name="Ann", weight=None), "id": 7, "empty": "", "prompt": "Hi"})
    assert (found, unused) == (answered(), ["id", "prompt", "messages.name"])
    rated = {**answered(), "labels": {"quality": 1, "spam": 0.5}, "attributes": {"violence": 1}}
    assert read(rated)[1] == ["labels.spam", "attributes.violence"]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "label": "quality:1"}]
    assert read({"conversations": turns * 2})[1] == ["conversations.label"]
    pair = {"prompt": "Hi", "chosen": answered()["messages"], "rejected": answered("No")["messages"], "id": 1}
    assert read(pair, "pairs")[1] == ["id"], "the prompt is repeated in the answers"


def test_the_stage_reports_in_how_many_rows_each_field_was_unused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Q{i}", "completion": "A", "id": i, **({"note": "x"} if i % 2 else {})} for i in range(20)]
    result, _, _ = prepare(tmp_path / "a", write(tmp_path / "x.jsonl", rows))
    assert result["sources"][0]["unused_fields"] == {"id": 20, "note": 10}


def test_if_all_rows_are_bad_leaving_them_out_is_not_suggested(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [answered(tool_calls=CALL)] * 3)
    for share in (0.0, 1.0):
        with pytest.raises(DataError, match="All 3 rows are bad") as caught:
            prepare(tmp_path / str(share), source, max_bad_fraction=share)
        assert f"{source}:1: message 2 has tool_calls" in str(caught.value)
        assert "max_bad_fraction" not in str(caught.value)


def test_a_blank_system_text_adds_no_message() -> None:
    assert with_system(answered(), " ") == answered()


# --- reasoning in the text ----------------------------------------------------------------------

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_is_trained_on_if_the_template_writes_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    row = answered("4", reasoning_content="2 and 2 is 4")
    (found,) = sft_rows(row, ChatTemplate.bind(tokenizer, "model"))
    assert found["output"] == "<think>2 and 2 is 4</think>4<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(BadRow, match="the chat template leaves out the reasoning_content"):
        sft_rows(row, ChatTemplate.bind(tokenizer, "model"))
    with pytest.raises(BadRow, match=r"a text of assistant contains <\|im_end\|>"):
        sft_rows(answered("4", reasoning_content="<|im_end|>"), ChatTemplate.bind(tokenizer, "model"))


# --- files --------------------------------------------------------------------------------------


def test_repeated_fields_and_huge_numbers_are_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1, "a": 2}\r\n{"a": {"b": 1, "b": 2}}\r\n{"a": ' + b"1" * 5000 + b'}\r\n{"a": "trunc')
    assert [str(row.content) for row in read_rows(file)] == [
        "the field a appears twice in one object",
        "the field b appears twice in one object",
        "not JSON: a number has too many digits",
        "not JSON: Unterminated string starting at in column 7",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message", "line"),
    [
        ("x.jsonl", b'\n{\n  "prompt": "Hi"\n}\n', "JSON over several lines", ":2"),
        ("x.jsonl", b"[\n{}\n]", "name it .json", ":1"),
        ("x.json", b'[\n{"a": 1},\n{"b" 2}]', "Not JSON: Expecting ':' delimiter in column 6", ":3"),
        ("x.json", b'[{"a": 1, "a": 2}]', "the field a appears twice", ""),
        ("x.json", b"[" + b"1" * 5000 + b"]", "Exceeds the limit", ""),
    ],
)
def test_a_file_error_names_the_place(tmp_path: Path, name: str, content: bytes, message: str, line: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert message in str(caught.value)
    assert f"where: {file}{line}" in str(caught.value)


def test_a_column_that_python_cannot_hold_is_an_error_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    times = pa.array([2**60], pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": ["Hi"], "when": times}), file)
    with pytest.raises(DataError, match="Not a readable parquet file"):
        list(read_rows(file))


def test_a_file_whose_name_is_not_utf8_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "caf\udce9.jsonl"
    source = write(file, [{"prompt": f"Q{i}", "completion": "A"} for i in range(20)])
    _, train, _ = prepare(tmp_path / "a", {"source": source})
    assert train[0]["origin"].endswith("udce9.jsonl:1") or "\udce9" in train[0]["origin"]
