"""Tests of converting public formats to checked rows: adapters, and reasons for bad rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_minitron.data.chat import fields
from nemo_minitron.data.chat.formats import FORMATS, FORMATS_OF, detect
from nemo_minitron.data.chat.rows import BadRow, question, with_system

Fields = dict[str, Any]


def dialogue(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def chat(*texts: str, system: str | None = None, **attributes: float) -> Fields:
    row: Fields = {"messages": dialogue(*texts, system=system)}
    return {**row, "attributes": attributes} if attributes else row


def pair(*prompt: str, chosen: str = "Yes", rejected: str = "No", system: str | None = None, **more: float) -> Fields:
    return {"prompt": dialogue(*prompt, system=system), "chosen": chosen, "rejected": rejected, **more}


def adapted(name: str, row: Fields, renames: dict[str, Any] | None = None) -> Fields:
    return FORMATS[name].read(fields.Fields(row), renames or {})


PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]


def nemo(label: str) -> Fields:
    """Return a row in the format of NeMo-Aligner's chat data set."""
    turns = [{"from": "User", "value": "Hi", "label": None}, {"from": "Assistant", "value": "Ho", "label": label}]
    return {"system": "Be kind.", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": turns}


RULES: Fields = {
    "instruction_id_list": ["keywords:existence", "punctuation:no_comma"],
    "kwargs": [{"keywords": ["snow"]}, {}],
}
IFEVAL_ROW: Fields = {**RULES, "kwargs": [{"keywords": ["snow"], "num_words": None}, None]}
HELPSTEER = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
OASST_LABELS = {"quality": {"value": 0.75, "count": 3}, "humor": {"value": 0.1, "count": 3}, "spam": {"value": 0.0}}
CODE = "if (a << 2 == b && c >> 1) cout << x;\n<<Bonjour>>"
HH = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Really?\n\nAssistant: "

# (detected format, row, checked row)
ADAPTED: tuple[tuple[str, Fields, Fields], ...] = (
    ("messages", {"messages": dialogue("Hi", "Ho")}, chat("Hi", "Ho")),
    ("messages", {"messages": dialogue(" Hi\n", "\n\n Ho ", system=" S ")}, chat("Hi", "Ho", system="S")),
    ("messages", {"messages": [{"role": "system", "content": " "}, *dialogue("Hi", "Ho")]}, chat("Hi", "Ho")),
    ("messages", {"messages": [{"role": "user", "content": PARTS}, *dialogue("", "Ho")[1:]]}, chat("Hi", "Ho")),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        chat("Hi", "Ho"),
    ),
    ("sharegpt", nemo("humor:0,quality:3.5"), chat("Hi", "Ho", system="Be kind.", humor=0, quality=3.5)),
    ("sharegpt", nemo(""), chat("Hi", "Ho", system="Be kind.")),
    ("prompt_completion", {"prompt": "Hi", "completion": "Ho"}, chat("Hi", "Ho")),
    ("prompt_completion", {"prompt": dialogue("Hi"), "completion": dialogue("Hi", "Ho")[1:]}, chat("Hi", "Ho")),
    ("prompt_completion", {"input": "Hi", "output": "Ho"}, chat("Hi", "Ho")),
    ("prompt_completion", {"instruction": "Add.", "input": "1 2", "output": "3"}, chat("Add.\n\n1 2", "3")),
    (
        "prompt_completion",
        {"instruction": "Hi", "input": "", "output": "Ho", "system": "S"},
        chat("Hi", "Ho", system="S"),
    ),
    (
        "prompt_completion",
        {"prompt": "What?", "context": "A text.", "response": "That."},
        chat("A text.\n\nWhat?", "That."),
    ),
    ("prompt_completion", {"prompt": "Hi", "response": "Ho", "id": 7}, chat("Hi", "Ho")),
    ("prompt_completion", {"prompt": "Hi", "completion": "Ho", **IFEVAL_ROW}, {**chat("Hi", "Ho"), **RULES}),
    ("messages", {"messages": dialogue("Hi", "Ho"), "instruction_id_list": [], "kwargs": []}, chat("Hi", "Ho")),
    ("prompts", {"key": 7, "prompt": "Hi", **IFEVAL_ROW}, {"messages": dialogue("Hi"), **RULES}),
    ("prompts", {"instruction": "Add.", "input": "1 2", "output": "3"}, {"messages": dialogue("Add.\n\n1 2")}),
    ("prompts", {"messages": dialogue("Hi", "Ho", "Why?")}, {"messages": dialogue("Hi", "Ho", "Why?")}),
    ("prompts", {"messages": dialogue("Hi", "Ho"), "system": "S"}, {"messages": dialogue("Hi", system="S")}),
    (
        "prompts",
        {"prompt": "Hi", **{key: json.dumps(value) for key, value in IFEVAL_ROW.items()}},
        {"messages": dialogue("Hi"), **RULES},
    ),
    ("gsm8k", {"question": "2 by 3?", "answer": "2*3=<<2*3=6>>6\n#### 6"}, chat("2 by 3?", "2*3=6\n#### 6")),
    ("gsm8k", {"question": "Hi", "answer": f"{CODE}\n#### 1"}, chat("Hi", f"{CODE}\n#### 1")),
    ("prompt_completion", {"question": "Hi", "answer": CODE}, chat("Hi", CODE)),
    ("prompt_completion", {"instruction": "Sort.", "input": "[]", "output": "[]"}, chat("Sort.\n\n[]", "[]")),
    ("prompts", {"prompt": "Is it valid?", "context": "null"}, {"messages": dialogue("null\n\nIs it valid?")}),
    ("helpsteer", {"prompt": "Hi", "response": "Ho", **HELPSTEER}, chat("Hi", "Ho", **HELPSTEER)),
    (
        "oasst",
        {"messages": dialogue("Hi", "Ho"), "attributes": {"quality": 3, "violence": 1}},
        chat("Hi", "Ho", quality=3),
    ),
    ("oasst", {"messages": dialogue("Hi", "Ho"), "labels": OASST_LABELS}, chat("Hi", "Ho", quality=3, humor=0)),
    (
        "oasst",
        {"messages": dialogue("Hi", "Ho"), "labels": {"name": ["quality"], "value": [1.0]}},
        chat("Hi", "Ho", quality=4),
    ),
    (
        "oasst",
        {"messages": dialogue("Hi", "Ho"), "toxicity": 0, "quality": None, "id": 7},
        chat("Hi", "Ho", toxicity=0),
    ),
    ("pairs", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, pair("Hi")),
    ("pairs", {"prompt": "Q", "context": "A text.", "chosen": "Yes", "rejected": "No"}, pair("A text.\n\nQ")),
    ("pairs", {"system": "S", "question": "Hi", "chosen": "Yes", "rejected": "No"}, pair("Hi", system="S")),
    (
        "pairs",
        {
            "prompt": "Hi",
            "chosen": dialogue("Hi", "Yes"),
            "rejected": dialogue("Hi", "No"),
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        pair("Hi", chosen_reward=8.5, rejected_reward=3),
    ),
    (
        "pairs",
        {
            "prompt": "Hi",
            "chosen_response": "Yes",
            "rejected_response": "No",
            "chosen_reward": 1.0,
            "rejected_reward": -1.0,
        },
        pair("Hi", chosen_reward=1.0, rejected_reward=-1.0),
    ),
    (
        "pairs",
        {
            "prompt": dialogue("A", "B", "C"),
            "chosen_response": dialogue("", "Yes")[1],
            "rejected_response": dialogue("", "No")[1],
        },
        pair("A", "B", "C"),
    ),
    ("hh", {"chosen": f"{HH}Yes", "rejected": f"{HH}No"}, pair("Hi", "Ho", "Really?")),
    (
        "worked_answers",
        {"question": "2 by 3?", "answer": "2*3=<<2*3=6>>6\n#### 6"},
        {**pair("2 by 3?", chosen_reward=1.0, rejected_reward=0.0), "chosen": "2*3=6\n#### 6", "rejected": "6"},
    ),
)


@pytest.mark.parametrize(
    "row", [pair("Hi", "Ho", "Really?"), {"chosen": f"{HH}Yes", "rejected": f"{HH}No"}], ids=["pairs", "hh"]
)
def test_an_answer_of_a_pair_becomes_a_conversation_on_request(row: Fields) -> None:
    for which, answer in (("chosen", "Yes"), ("rejected", "No")):
        found = adapted(f"{which}_answers", row)
        assert [message["content"] for message in found["messages"]] == ["Hi", "Ho", "Really?", answer]
    with pytest.raises(BadRow, match="no known format"):
        detect(row, "conversations")


def rows_of(name: str) -> Any:
    return FORMATS[name].rows


@pytest.mark.parametrize(("name", "row", "expected"), ADAPTED)
def test_a_public_row_is_recognized_and_normalized(name: str, row: Fields, expected: Fields) -> None:
    assert detect(row, rows_of(name)) == name
    assert adapted(name, row) == expected


def test_every_format_is_tried() -> None:
    by_name = {"chosen_answers", "rejected_answers", "result_place", "result_first"}
    assert {name for name, _, _ in ADAPTED} | by_name == FORMATS.keys()


def test_the_preferred_place_of_a_result_is_the_requested_one_and_tells_nothing_else() -> None:
    first, last = "#### 6\n2*3=6", "2*3=6\n#### 6"
    chosen = []
    for number in range(400):
        row = {"question": f"2 by 3, {number}?", "answer": "2*3=<<2*3=6>>6\n#### 6"}
        found = adapted("result_place", row)
        place = "first" if found["chosen"] == first else "last"
        assert {found["chosen"], found["rejected"]} == {first, last}
        prompt = f"{row['question']}\nWrite the result in the {place} line."
        assert found["prompt"] == [{"role": "user", "content": prompt}]
        chosen.append(place)
    assert 160 < chosen.count("first") < 240, "half of the pairs, within four standard errors"


def test_an_answer_with_its_result_first_is_preferred_over_the_same_text() -> None:
    found = adapted("result_first", {"question": "2 by 3?", "answer": "2*3=<<2*3=6>>6\n#### 6"})
    assert (found["chosen"], found["rejected"]) == ("#### 6\n2*3=6", "2*3=6\n#### 6")
    assert found["prompt"] == [{"role": "user", "content": "2 by 3?"}]


@pytest.mark.parametrize(("which", "answer"), [("chosen", "3 + 3 = 6\n#### 6"), ("rejected", "6")])
def test_one_answer_of_a_pair_of_any_format_is_a_conversation(which: str, answer: str) -> None:
    row = {"question": "What is 3 + 3?", "answer": "3 + 3 = <<3+3=6>>6\n#### 6"}
    found = adapted(f"{which}_answers", row)
    assert [message["content"] for message in found["messages"]] == ["What is 3 + 3?", answer]


def test_written_rows_are_read_back_unchanged() -> None:
    for name, row, expected in ADAPTED:
        by_keys = "oasst" if "attributes" in expected else "messages" if "messages" in expected else "pairs"
        again = name if rows_of(name) == "prompts" else by_keys
        assert detect(expected, rows_of(name)) == again, row
        assert adapted(again, expected) == expected


def test_other_names_of_attributes_are_renamed_or_left_out() -> None:
    row = {"prompt": "Hi", "response": "Ho", "factuality": 4, "relevance": 1, "coherence": 2}
    renames = {"factuality": "correctness", "relevance": None}
    assert adapted("helpsteer", row, renames) == chat("Hi", "Ho", correctness=4, coherence=2)


# (format, row, reason)
BAD: tuple[tuple[str, Fields, str], ...] = (
    ("messages", {"text": "Hi"}, "there is no field messages; the row has text"),
    ("messages", {"messages": []}, "messages is [], not a list of messages"),
    ("messages", {"messages": "Hi"}, "messages is 'Hi', not a list of messages"),
    ("messages", {"messages": ["Hi"]}, "message 1 is 'Hi', not an object"),
    (
        "messages",
        {"messages": [{"role": "tool", "content": "x"}]},
        "message 1 has the role 'tool'; known: system, developer, user",
    ),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "message 1 has no text"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 has a part of type 'image'",
    ),
    ("messages", {"messages": [{"role": "system", "content": "S"}]}, "there are no messages"),
    ("messages", {"messages": dialogue("Hi", " \n")}, "message 2 (assistant) is empty"),
    (
        "messages",
        {"messages": dialogue("Hi", "\ud800")},
        "message 2 (assistant) has an unpaired surrogate at character 0",
    ),
    ("messages", {"messages": dialogue("Hi")}, "the last message is from user, not from assistant"),
    ("messages", {"messages": dialogue("Hi", "Ho")[1:]}, "message 1 is from assistant, but should be from user"),
    ("messages", {"messages": dialogue("Hi") * 2}, "message 2 is from user, but should be from assistant"),
    (
        "messages",
        {"messages": [*dialogue("Hi"), *dialogue("", "", system="S")[:1]]},
        "message 2 is from system, but should be",
    ),
    ("messages", chat("Hi", "Ho", violence=1), "unknown attribute 'violence'; known: quality, toxicity"),
    ("messages", chat("Hi", "Ho", quality=4.01), "attribute quality is 4.01, out of the range 0 to 4"),
    ("messages", chat("Hi", "Ho", quality="high"), "attribute quality is 'high', not a number"),  # type: ignore[arg-type]
    ("messages", chat("Hi", "Ho", quality=float("nan")), "attribute quality is nan, not a number"),
    ("messages", {"messages": dialogue("Hi", "Ho"), "attributes": [3]}, "attributes is [3], not an object"),
    (
        "oasst",
        {"messages": dialogue("Hi", "Ho"), "labels": {"quality": 3}},
        "label quality is 3, not a number from 0 to 1",
    ),
    ("sharegpt", nemo("correctness:4.5"), "attribute correctness is 4.5, out of the range"),
    ("sharegpt", nemo("good"), "label 'good' is not of the form name:number"),
    ("prompts", {"messages": dialogue("Hi", "Ho")[1:]}, "there are no messages"),
    ("prompts", {"prompt": "Hi", "instruction_id_list": "x", "kwargs": [{}]}, "instruction_id_list is 'x', not a list"),
    ("prompts", {"prompt": "Hi", "instruction_id_list": ["x"]}, "kwargs is None, not a list of objects"),
    ("prompts", {"prompt": "Hi", "instruction_id_list": ["x"], "kwargs": []}, "the row has 1 rules and 0 kwargs"),
    ("prompts", {"messages": dialogue("Hi", "Ho")[1:], "system": "S"}, "there are no messages"),
    ("prompts", {**RULES, "prompt": "Hi", "kwargs": [{"k": "\ud800"}, {}]}, "kwargs has an unpaired surrogate"),
    ("prompts", {**RULES, "prompt": "Hi", "kwargs": [{"k": b"x"}, {}]}, "kwargs cannot be written as JSON"),
    ("prompts", {"prompt": "Hi", "instruction_id_list": ["\ud800"], "kwargs": [{}]}, "list has an unpaired surrogate"),
    ("gsm8k", {"question": "Hi"}, "there is no field answer; the row has question"),
    ("gsm8k", {"question": "Hi", "answer": 3}, "answer is 3, not text"),
    ("worked_answers", {"question": "Hi", "answer": "6"}, "answer has no number after ####"),
    ("result_first", {"question": "Hi", "answer": "#### 6"}, "answer has no steps before ####"),
    ("result_place", {"question": "Hi", "answer": "6"}, "answer has no number after ####"),
    ("result_place", {"question": "Hi", "answer": "#### 6"}, "answer has no steps before ####"),
    ("helpsteer", {"prompt": "Hi", "response": "Ho", "tokens": 3}, "unknown attribute 'tokens'"),
    ("helpsteer", {"prompt": "Hi", "quality": 3}, "there is no field response; the row has prompt, quality"),
    ("prompt_completion", {"prompt": "Hi"}, "there is no field completion or output or response or answer"),
    ("pairs", {"prompt": "Hi", "chosen": "Yes"}, "there is no field rejected or rejected_response"),
    ("pairs", pair("Hi", rejected=" Yes"), "chosen and rejected are the same text"),
    ("pairs", pair("Hi", rejected=" "), "rejected is empty"),
    ("pairs", pair("Hi", chosen_reward=1.0), "chosen_reward is given, but the other reward is missing"),
    ("pairs", pair("Hi", chosen_reward="1", rejected_reward=1.0), "chosen_reward is '1', not a number"),  # type: ignore[arg-type]
    ("pairs", pair("Hi", "Ho"), "the last message is from assistant, not from user"),
    (
        "pairs",
        {"chosen": dialogue("A", "Yes"), "rejected": dialogue("B", "No")},
        "chosen and rejected answer different prompts",
    ),
    (
        "pairs",
        {"chosen": dialogue("A"), "rejected": dialogue("A")},
        "chosen ends with a message from user, not from assistant",
    ),
    ("hh", {"chosen": "Yes", "rejected": "No"}, "chosen does not begin with 'Human:'"),
    (
        "hh",
        {"system": "S", "chosen": "\n\nAssistant: Yes", "rejected": "\n\nAssistant: No"},
        "there are no messages",
    ),
    ("hh", {"chosen": f"{HH}Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "answer different prompts"),
)


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_bad_row_gives_a_reason(name: str, row: Fields, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        adapted(name, row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": dialogue("Hi", "Ho"), "stars": 3},
        {"conversations": dialogue("Hi", "Ho"), "stars": 3},
        {"prompt": "Hi", "completion": "Ho", "stars": 3},
        {"prompt": "Hi", "completion": "Ho", "attributes": {"stars": 3}},
    ],
)
def test_a_renamed_rating_is_found_in_every_format(row: Fields) -> None:
    found = adapted(detect(row, "conversations"), row, {"stars": "quality"})
    assert found == chat("Hi", "Ho", quality=3)


def test_two_attributes_cannot_have_the_same_name() -> None:
    with pytest.raises(BadRow, match="two attributes are named quality"):
        adapted("helpsteer", {"prompt": "Hi", "response": "Ho", "quality": 1, "stars": 2}, {"stars": "quality"})


@pytest.mark.parametrize("rows", FORMATS_OF)
def test_the_error_on_an_unknown_format_lists_the_fields(rows: Any) -> None:
    with pytest.raises(BadRow, match=f"no known format of {rows} has the fields text, id"):
        detect({"text": "Hi", "id": 1}, rows)


def test_a_system_text_is_added_if_a_row_has_none() -> None:
    assert with_system(chat("Hi", "Ho"), " S ") == chat("Hi", "Ho", system="S")
    assert with_system(pair("Hi"), "S") == pair("Hi", system="S")
    assert with_system(chat("Hi", "Ho", system="Own"), "S") == chat("Hi", "Ho", system="Own")
    assert with_system(chat("Hi", "Ho"), None) == chat("Hi", "Ho")


def test_the_question_is_the_first_text_of_the_user_without_case_and_spaces() -> None:
    assert question(chat(" What\n IS it?", "x", system="S")) == question(pair("what is it?", "x", "y")) == "what is it?"


def test_fields_can_be_left_out() -> None:
    from nemo_minitron.schema.chats import ChatSource
    from nemo_minitron.stages.chat_data.run import _without_left_out

    source = ChatSource(source="x", leave_out=("context",))
    assert _without_left_out({"prompt": "Q", "context": "A text."}, source) == {"prompt": "Q"}
