"""Tests of the chat_data stage: held-out rows, rows left out, messages."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.rows import question
from nemo_minitron.data.chat.split import copies, heldout_questions, text_hash
from nemo_minitron.errors import DataError
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.chat_data.params import ChatDataStage
from nemo_minitron.stages.chat_data.run import chat_data
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.typed_inputs import NoInputs
from nemo_minitron.system.progress import Progress
from tests.conftest import Cli

Rows = list[dict[str, Any]]


def write(file: Path, rows: Rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(first: int, last: int) -> Rows:
    return [
        {"question": f"What is {i} and {i}?", "answer": f"<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(first, last)
    ]


def prepare(
    folder: Path, *sources: dict[str, Any] | str, output: list[str] | None = None, **params: Any
) -> tuple[dict[str, Any], Rows, Rows]:
    """Return (result, training rows, validation rows)."""
    listed = [{"source": source} if isinstance(source, str) else source for source in sources]
    stage = ChatDataStage(
        **{"kind": "chat_data", "rows": "conversations", "valid_rows": 10, "sources": listed, **params}
    )
    out, work = folder / "out", folder / "work"
    out.mkdir(parents=True)
    work.mkdir()
    progress = Progress(silent=True)
    if output is not None:
        progress.say = output.append  # type: ignore[method-assign]
    result = chat_data(stage, NoInputs(), StageContext("chats", "test", out, work, Execution(), progress))
    train, valid = (list(map(json.loads, (out / f"{s}.jsonl").open(encoding="utf-8"))) for s in ("train", "valid"))
    assert json.loads((out / "facts.json").read_text()) == result
    return dict(result), train, valid


def texts(rows: Rows) -> set[str]:
    return {json.dumps({**row, "origin": ""}, sort_keys=True) for row in rows}


def test_every_row_is_in_one_part_with_its_origin(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", sums(0, 200))
    result, train, valid = prepare(tmp_path / "a", source)
    assert (len(train), len(valid)) == (190, 10) == (result["train_rows"], result["valid_rows"])
    assert {row["origin"] for row in [*train, *valid]} == {f"x.jsonl:{number}" for number in range(1, 201)}
    facts = {"source": source, "format": "gsm8k", "rows": 200, "bad_rows": 0, "weight": 1.0, "unused_fields": {}}
    assert result["sources"] == [facts]
    assert train[0]["messages"][1] == {"role": "assistant", "content": "0\n#### 0"}


def test_the_held_out_rows_do_not_depend_on_the_order_nor_on_the_files(tmp_path: Path) -> None:
    rows = sums(0, 200)
    whole = write(tmp_path / "x.jsonl", rows)
    random.Random(0).shuffle(rows)
    keep = {"weight": 0.5}
    parts = [write(tmp_path / "y.jsonl", rows[:50]), write(tmp_path / "z.jsonl", rows[50:])]
    one = prepare(tmp_path / "a", {"source": whole, **keep})
    other = prepare(tmp_path / "b", *({"source": part, **keep} for part in parts))
    assert 70 < len(one[1]) < 120
    assert texts(one[2]) == texts(other[2])
    assert texts(one[1]) == texts(other[1])
    assert texts(prepare(tmp_path / "c", whole, seed=1)[2]) != texts(one[2])


def test_no_question_is_in_both_parts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i % 40}", "chosen": f"Yes {i}", "rejected": "No"} for i in range(200)]
    for row in rows[::3]:
        row["prompt"] = row["prompt"].upper() + "  "
    result, train, valid = prepare(tmp_path / "a", write(tmp_path / "x.jsonl", rows), rows="pairs", valid_rows=12)
    assert result["num_questions"] == 40
    assert not {question(row) for row in train} & {question(row) for row in valid}
    assert len(valid) == 10, "questions have five rows: a third question would exceed valid_rows"


def test_conversations_that_begin_alike_stay_together(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": r, "content": f"{r} {i % 20}"} for r in ("user", "assistant")]} for i in range(40)]
    for row in rows[20:]:
        row["messages"] += [{"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]
    _, train, valid = prepare(tmp_path / "a", write(tmp_path / "x.jsonl", rows))
    assert len(valid) == 10
    assert not {question(row) for row in train} & {question(row) for row in valid}


def test_the_split_is_fixed() -> None:
    hashes = {text_hash(1234, f"question {number}"): 1 for number in range(100)}
    held = heldout_questions(hashes, 3)
    found = [number for number, key in enumerate(hashes) if key in held]
    assert found == [28, 39, 46], "with another choice old and new runs cannot be compared"
    assert held < heldout_questions(hashes, 5), "more held-out rows only add to those that were"


def test_a_weight_repeats_or_thins_out_training_rows_only(tmp_path: Path) -> None:
    sources = [
        {"source": write(tmp_path / f"{w}.jsonl", sums(n, n + 400)), "weight": w} for n, w in ((0, 2), (500, 0.5))
    ]
    result, train, valid = prepare(tmp_path / "a", *sources, valid_rows=50)
    by_file = [[row["origin"] for row in train if row["origin"].startswith(name)] for name in ("2.", "0.5")]
    assert len(by_file[0]) == 2 * len(set(by_file[0]))
    assert 120 < len(by_file[1]) == len(set(by_file[1])) < 250
    assert len(valid) == len(texts(valid)) == 50
    assert result["train_rows"] == len(train)
    assert [copies(2.25, at << 62) for at in range(4)] == [3, 2, 2, 2]


def test_files_that_are_not_read_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "test.jsonl", sums(0, 20))
    (folder / "more.csv").write_text("a,b")
    output: list[str] = []
    prepare(tmp_path / "a", str(folder), output=output)
    assert any(f"1 file left out, the first is {folder}/more.csv" in text for text in output)
    assert any(
        f"1 file named like held-out data, read like the others; the first is {folder}/test.jsonl" in text
        for text in output
    )


def test_max_rows_counts_good_rows(tmp_path: Path) -> None:
    rows = [{"question": "no answer"}, *sums(0, 100)]
    source = {"source": write(tmp_path / "x.jsonl", rows), "format": "gsm8k", "max_rows": 30}
    result, train, valid = prepare(tmp_path / "a", source, max_bad_fraction=0.1)
    assert result["bad_rows"] == 1
    assert {row["origin"] for row in [*train, *valid]} == {f"x.jsonl:{line}" for line in range(2, 32)}


def test_ratings_are_counted_and_a_system_text_is_added(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q {i}", "response": "A", "stars": i % 5, "quality": 4} for i in range(50)]
    source = {"source": write(tmp_path / "x.jsonl", rows), "attributes": {"stars": "helpfulness"}}
    result, train, _ = prepare(tmp_path / "a", source, system="Be kind.")
    assert result["attributes"] == {"quality": {"rows": 50, "mean": 4.0}, "helpfulness": {"rows": 50, "mean": 2.0}}
    assert all(row["messages"][0] == {"role": "system", "content": "Be kind."} for row in train)


# --- errors -------------------------------------------------------------------------------------


def test_any_bad_row_stops_and_the_first_ten_are_listed(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [*sums(0, 85), *({"question": "Q", "answer": " "} for _ in range(15))])
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "a", source)
    lines = str(caught.value).splitlines()
    assert lines[0] == "15 of 100 rows are bad (15.0%):"
    assert lines[1] == f"  - {source}:86: message 2 (assistant) is empty"
    assert lines[10].startswith(f"  - {source}:95: ")
    assert lines[11:] == [
        "  - ... and 5 more",
        "  where: stages.chats",
        "  allowed: stages.chats.max_bad_fraction = 0.0",
        "  next: Correct the rows, or leave them out with stages.chats.max_bad_fraction=0.151.",
    ]


def test_tolerated_rows_are_listed_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    source = write(file, sums(0, 99))
    with file.open("a") as more:
        more.write("{oops\n")
    result, train, valid = prepare(tmp_path / "a", source, max_bad_fraction=0.01)
    assert (result["bad_rows"], len(train) + len(valid)) == (1, 99)
    listed = [json.loads(line) for line in (tmp_path / "a/out/bad_rows.jsonl").read_text().splitlines()]
    reason = "not JSON: Expecting property name enclosed in double quotes in column 2"
    assert listed == [{"origin": "x.jsonl:100", "source": source, "reason": reason}]
    assert not (
        prepare(tmp_path / "b", {"source": source, "max_rows": 50}) and (tmp_path / "b/out/bad_rows.jsonl").exists()
    )


def test_the_error_on_an_unknown_format_lists_fields_and_formats(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"text": "Hi"}])
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "a", source, rows="pairs")
    message = str(caught.value)
    for part in ("has the fields text", f"{source}:1", "rows = pairs: hh, pairs", "stages.chats.sources.0.format"):
        assert part in message


@pytest.mark.parametrize(("count", "valid_rows", "part"), [(5, 5, "training"), (3, 10, "training")])
def test_both_parts_need_rows(tmp_path: Path, count: int, valid_rows: int, part: str) -> None:
    with pytest.raises(DataError, match=f"None of {count} valid rows is left for {part}"):
        prepare(tmp_path / "a", write(tmp_path / "x.jsonl", sums(0, count)), valid_rows=valid_rows)


def test_one_question_cannot_be_divided(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": str(i)} for i in range(20)]
    source = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="None of 20 valid rows is left for validation"):
        prepare(tmp_path / "a", source)
    assert len(prepare(tmp_path / "b", source, valid_rows=0)[1]) == 20


# --- from the command line ----------------------------------------------------------------------


def recipe(folder: Path, source: str, **stage: Any) -> Path:
    keys = {"kind": "chat_data", "rows": "conversations", "valid_rows": 5, "sources": [{"source": source}], **stage}
    file = folder / "recipe.yaml"
    content = {"name": "chats", "stages": {"chats": keys}, "execution": {"run_root": str(folder / "runs")}}
    file.write_text(json.dumps(content))
    return file


def test_check_finds_a_format_of_the_other_kind_and_a_missing_file(tmp_path: Path, minitron: Cli) -> None:
    file = recipe(tmp_path, "nowhere.jsonl", sources=[{"source": "nowhere.jsonl", "format": "hh"}])
    code, output = minitron("check", file)
    assert code == 2
    assert "stages.chats.sources.0.format = hh: contains no conversations" in output
    assert "stages.chats.sources.0.source = nowhere.jsonl: there is no such file" in output


def test_an_edited_source_makes_the_stage_changed(tmp_path: Path, minitron: Cli) -> None:
    source = tmp_path / "x.jsonl"
    file = recipe(tmp_path, write(source, sums(0, 50)))
    code, output = minitron("run", file)
    assert code == 0, output
    assert (
        json.loads(minitron("status", file, "--json")[1])["stages"]["chats"]["summary"] == "train_rows 45, valid_rows 5"
    )
    write(source, sums(0, 60))
    assert json.loads(minitron("plan", file, "--json")[1])["stages"][0]["status"] == "changed"


def test_show_prints_rows_and_what_a_model_reads(tmp_path: Path, minitron: Cli) -> None:
    from tests.support.tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = recipe(tmp_path, write(tmp_path / "x.jsonl", sums(0, 50)))
    code, output = minitron("show", file, "chats")
    assert code == 2
    assert "has not finished" in output
    assert f"minitron run {file} --until chats" in output
    assert minitron("run", file)[0] == 0
    code, output = minitron("show", file, "chats", "--rows", 2, "--split", "valid")
    assert code == 0, output
    assert output.count("user: What is") == output.count("assistant: ") == 2
    code, output = minitron("show", file, "chats", "--rows", 1, "--model", tmp_path / "model", "--template", "chatml")
    assert code == 0, output
    assert "<|im_start|>assistant\n" in output
    assert "tokens of prompt, 9 with loss]" in output
    code, output = minitron("show", file, "chats", "--model", tmp_path / "model", "--template", "llama3")
    assert code == 2
    assert "allowed: with this tokenizer: chatml, model" in output
    for option, allowed in (("--split=test", "train, valid"), ("--template=x", "chatml, llama3, extra_id, model")):
        code, output = minitron("show", file, "chats", option)
        assert code == 2
        assert allowed in output
    assert "allowed: chats" in minitron("show", file, "teacher")[1]
