"""Tests of evaluate_chat: rows that cannot be measured are counted, or reported before a training starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import TypeAdapter

from nemo_minitron.api import load_recipe
from nemo_minitron.artifacts.store import Store
from nemo_minitron.backends.alignment.nemo_aligner.rlhf_inputs import prompts_by_part
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.data.chat.heldout import HeldOut, read_heldout
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.answers import greedy_answers
from nemo_minitron.execution.preflight import preflight_evaluations
from nemo_minitron.plan.view import View
from nemo_minitron.report.alignment import alignment_facts, tables
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.rlhf import Rlhf
from nemo_minitron.stages.annotate.params import AnnotateStage
from nemo_minitron.stages.annotate.run import _readable
from nemo_minitron.stages.evaluate_chat import preflight
from nemo_minitron.stages.evaluate_chat.params import EvaluateChatStage
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO, Cli
from tests.support.distributed import run_ranks
from tests.support.tiny_models import CHAT_TEMPLATE, load_transformers, tiny_model_dir, tiny_tokenizer

Row = dict[str, Any]


def chat(question: str, answer: str = "An answer.") -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(question: str) -> Row:
    return {"prompt": chat(question)["messages"][:1], "chosen": "good " * 5, "rejected": "bad"}


def stage(**keys: Any) -> EvaluateChatStage:
    return EvaluateChatStage(
        **{"kind": "evaluate_chat", "label": "x", "inputs": {"model": "sft", "chats": "chats"}, **keys}
    )


def heldout(
    folder: Path, rows: list[Row], kind: Any = "conversations", template: str | None = None, **keys: Any
) -> HeldOut:
    lines = [json.dumps({**row, "origin": f"x.jsonl:{number}"}) + "\n" for number, row in enumerate(rows, 1)]
    (folder / "valid.jsonl").write_text("".join(lines))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or CHAT_TEMPLATE
    bound = ChatTemplate.bind(tokenizer, "model")
    return read_heldout(folder, kind, bound, stage(**keys), stage="chats", where="stages.measured")


MARKED = [chat("What is 1?"), chat("What is <|im_end|>?"), chat("What is 3?"), chat("What is 4? " * 20)]


def test_rows_that_cannot_be_measured_are_counted(tmp_path: Path) -> None:
    found = heldout(tmp_path, MARKED, max_bad_fraction=0.25, max_seq_len_tokens=60)
    assert found.facts() == {
        "rows": 4,
        "measured_rows": 2,
        "too_long_rows": 1,
        "bad_rows": 1,
        "first_bad_rows": ["x.jsonl:2: a text of user contains <|im_end|>, which the tokenizer reads as a marker"],
    }
    assert [row["origin"] for row in found.rows] == ["x.jsonl:1", "x.jsonl:3"]
    assert len(found.rendered) == 2
    assert found.left_out().startswith("2 of 4 held-out rows are left out: 1 too long, 1 bad (the first: x.jsonl:2:")


def test_the_error_on_too_many_bad_rows_names_the_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        heldout(tmp_path, MARKED)
    message = str(caught.value)
    assert "1 of 4 rows are bad (25.0%):\n  - x.jsonl:2: a text of user contains" in message
    assert "stages.measured.max_bad_fraction=0.251" in message


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        (CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "its own generation prompt"),
    ],
)
def test_if_every_row_is_bad_leaving_them_out_is_not_suggested(
    tmp_path: Path, template: str, reason: str, share: float
) -> None:
    with pytest.raises(DataError, match="All 2 rows are bad") as caught:
        heldout(tmp_path, MARKED[::2], template=template, max_bad_fraction=share)
    assert reason in str(caught.value)
    assert "max_bad_fraction" not in str(caught.value)


@pytest.mark.parametrize(("kind", "make"), [("conversations", chat), ("pairs", pair)])
def test_if_all_rows_are_too_long_the_error_has_the_shortest_length(tmp_path: Path, kind: Any, make: Any) -> None:
    rows = [make("What is " + "7" * size) for size in (3, 1, 2)]
    with pytest.raises(DataError, match="0 of 3 held-out rows fit into max_seq_len_tokens = 8") as caught:
        heldout(tmp_path, rows, kind, max_seq_len_tokens=8)
    needed = int(str(caught.value).split("Raise it to at least ")[1].split(",")[0])
    assert len(heldout(tmp_path, rows, kind, max_seq_len_tokens=needed).rows) == 1


def test_no_held_out_row_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Stage chats has no held-out rows") as caught:
        heldout(tmp_path, [])
    assert "Raise valid_rows" in str(caught.value)


# --- other readers of rows ----------------------------------------------------------------------


def files(folder: Path, rows: list[Row]) -> None:
    heldout(folder, rows, max_bad_fraction=1.0)
    (folder / "train.jsonl").write_bytes((folder / "valid.jsonl").read_bytes())


def test_prompts_of_rlhf_leave_out_a_few_bad_rows(tmp_path: Path) -> None:
    files(tmp_path, MARKED)
    bound = ChatTemplate.bind(tiny_tokenizer(), "chatml")
    found = prompts_by_part(Rlhf(algorithm="ppo", max_bad_fraction=0.25), tmp_path, bound)
    # Both files have the same rows, and a held-out prompt must not be a training prompt.
    assert [len(found[part]) for part in ("train", "valid")] == [3, 0]
    with pytest.raises(DataError, match=r"x\.jsonl:2: a text of user contains") as caught:
        prompts_by_part(Rlhf(algorithm="ppo"), tmp_path, bound)
    assert "leave them out with max_bad_fraction=0.251" in str(caught.value)


def test_an_annotation_leaves_out_a_few_bad_rows_and_needs_some(tmp_path: Path) -> None:
    files(tmp_path, MARKED)
    bound = ChatTemplate.bind(tiny_tokenizer(), "chatml")

    def readable(**keys: Any) -> int:
        params = AnnotateStage(kind="annotate", **keys)
        rows, texts, stats = _readable(tmp_path / "train.jsonl", bound, params, "stages.annotate")
        assert len(rows) == len(texts) == stats.num_rows
        return len(rows)

    assert readable(max_bad_fraction=0.25) == 3
    with pytest.raises(DataError, match=r"stages\.annotate\.max_bad_fraction=0\.251"):
        readable()
    with pytest.raises(DataError, match=r"0 of 3 rows of train\.jsonl fit into max_seq_len_tokens = 4"):
        readable(max_bad_fraction=0.25, max_seq_len_tokens=4)


def test_a_tokenizer_without_eos_ends_answers_where_the_model_does(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama_mha")
    model, tokenizer = load_transformers(folder), tiny_tokenizer()
    (wanted,) = greedy_answers(model, tokenizer, [[5, 6, 7]], 3, Progress(silent=True))
    tokenizer.eos_token = tokenizer.pad_token = None
    assert greedy_answers(model, tokenizer, [[5, 6, 7]], 3, Progress(silent=True)) == [wanted]
    model.generation_config.eos_token_id = None
    assert len(greedy_answers(model, tokenizer, [[5, 6, 7]], 3, Progress(silent=True))) == 1


# --- known from the recipe ----------------------------------------------------------------------


def recipe(folder: Path, **measured: Any) -> Recipe:
    stages = {
        "teacher": {"kind": "import", "source": str(folder / "llama_mha")},
        "chats": {
            "kind": "chat_data",
            "rows": measured.pop("rows", "conversations"),
            "valid_rows": measured.pop("valid_rows", 4),
            "sources": [{"source": str(folder / "chats.jsonl")}],
        },
        "sft": {
            "kind": "sft",
            "inputs": {"model": "teacher", "chats": "chats"},
            "global_batch_size": 2,
            "max_seq_len_tokens": 128,
            "lr": 1e-4,
            "max_bad_fraction": measured.pop("tolerated", 0.0),
        },
        "measured": {"kind": "evaluate_chat", "label": "x", "inputs": {"model": "sft", "chats": "chats"}, **measured},
    }
    content = {"name": "r", "stages": stages, "execution": {"run_root": str(folder / "runs"), "device": "cpu"}}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return TypeAdapter(Recipe).validate_python(content)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"valid_rows": 0}, "stage chats has valid_rows = 0"),
        ({"tolerated": 0.1}, "Next: stages.measured.max_bad_fraction=0.1"),
        ({"vary_attribute": "verbosity"}, "set num_generated"),
        ({"rows": "pairs", "num_generated": 3}, "needs conversations, and stage chats has pairs"),
        ({"inputs": {"model": "sft", "chats": "chats", "reference": "teacher"}}, "stage chats has conversations"),
    ],
)
def test_missing_inputs_of_an_evaluation_are_found_in_the_recipe(
    tmp_path: Path, keys: dict[str, Any], problem: str
) -> None:
    made = recipe(tmp_path, **keys)
    (found,) = _problems(made)
    assert found.startswith("stages.measured.")
    assert problem in found
    good = recipe(tmp_path)
    assert not list(_problems(good))


def _problems(recipe: Recipe) -> Iterable[str]:
    params = recipe.stages["measured"]
    return STAGES[params.kind].problems("measured", params, View(recipe))


# --- from the command line ----------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path, minitron: Cli) -> Path:
    """Create a folder with finished teacher and chats; one held-out row in four contains a marker."""
    tiny_model_dir(tmp_path, "llama_mha")
    rows = [chat(f"What is {number}?" + " <|im_end|>" * (number % 4 == 0)) for number in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe(tmp_path, valid_rows=8)
    for name in ("teacher", "chats"):
        code, said = minitron("run", tmp_path / "recipe.yaml", "--until", name)
        assert code == 0, said
    return tmp_path


def test_an_evaluation_that_would_fail_stops_before_the_training(prepared: Path) -> None:
    made = recipe(prepared, valid_rows=8)
    store = Store(prepared / "runs/r")
    with pytest.raises(DataError, match="Stage measured would fail after the training of sft") as caught:
        preflight_evaluations("sft", made, store, made.stages)
    assert "chats.jsonl:" in str(caught.value)
    assert "stages.measured.max_bad_fraction=" in str(caught.value)
    preflight_evaluations("sft", made, store, ["sft"])  # the run ends before the evaluation
    preflight_evaluations("chats", made, store, made.stages)  # nothing is trained
    tolerant = recipe(prepared, valid_rows=8, max_bad_fraction=0.9)
    preflight_evaluations("sft", tolerant, store, tolerant.stages)
    missing = recipe(prepared, valid_rows=8, max_bad_fraction=0.9, vary_attribute="verbosity", num_generated=2)
    with pytest.raises(DataError, match="chat template has no attributes"):
        preflight_evaluations("sft", missing, store, missing.stages)


def test_the_result_and_the_report_have_the_number_of_measured_rows(prepared: Path, minitron: Cli) -> None:
    inputs = {"model": "teacher", "chats": "chats"}
    keys = {"inputs": inputs, "max_bad_fraction": 0.9, "num_generated": 2, "max_new_tokens": 2, "prompts": ["Hi"]}
    recipe(prepared, valid_rows=8, **keys)
    code, said = minitron("run", prepared / "recipe.yaml", "--until", "measured")
    assert code == 0, said
    metrics = json.loads((prepared / "runs/r/measured/metrics.json").read_text())
    assert metrics["rows"] == 8
    assert 0 < metrics["bad_rows"] == 8 - metrics["measured_rows"]
    assert metrics["conversations"]["answers"] == metrics["measured_rows"]
    assert f"{metrics['bad_rows']} of 8 held-out rows are left out" in said
    facts = alignment_facts([Store(prepared / "runs/r").artifact("measured", "unverified")])
    assert facts is not None
    (table,) = tables(facts)
    assert table["header"][:2] == ["model", "rows"]
    assert table["rows"][0][:2] == ["x", f"{metrics['measured_rows']} of 8"]
    recipe(prepared, valid_rows=8, **{**keys, "prompts": ["a <|im_end|>"]})
    code, said = minitron("run", prepared / "recipe.yaml", "--until", "measured", "--rerun", "changed")
    assert code == 2
    assert "stages.measured.prompts.0" in said


# --- several ranks ------------------------------------------------------------------------------


def answers_of_rank(ranks: int, folder: Path) -> tuple[list[float], list[tuple[str, int]], int]:
    """Return log-probabilities and answers, and the number of rows that this rank has computed itself."""
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.evaluation import answers
    from nemo_minitron.schema.execution import Parallel

    own = [0]

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            found = function(*args)
            own[0] += len(found)
            return found

        return call

    model, tokenizer, silent = load_transformers(folder), tiny_tokenizer(), Progress(silent=True)
    sequences = [([5 + number % 7] * (1 + number % 9), [9, 8, 7][: 1 + number % 3]) for number in range(40)]
    with (
        patch.multiple(answers, _log_probs=counted(answers._log_probs), continued=counted(answers.continued)),
        patch.multiple(answers, TOKENS_PER_BATCH=40, PROMPTS_PER_BATCH=4),
        open_session(Parallel(dp=ranks), device="cpu") as session,
    ):
        values = answers.answer_log_probs(model, sequences, silent, "all", session)
        texts = answers.greedy_answers(model, tokenizer, [prompt for prompt, _ in sequences], 4, silent, None, session)
    return values, texts, own[0]


def test_ranks_share_out_the_batches_and_all_get_every_answer(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama_mha")
    ((values, texts, number),) = run_ranks(1, answers_of_rank, 1, folder)
    assert number == 2 * 40 == 2 * len(values)
    for found in (ranks := run_ranks(2, answers_of_rank, 2, folder)):
        assert found[:2] == (values, texts)
    assert sum(own for *_, own in ranks) == number
    assert max(own for *_, own in ranks) < 0.7 * number


def test_an_evaluation_on_two_ranks_writes_the_files_of_one(prepared: Path, minitron: Cli) -> None:
    inputs = {"model": "teacher", "chats": "chats"}
    keys = {"inputs": inputs, "max_bad_fraction": 0.9, "num_generated": 6, "max_new_tokens": 3, "prompts": ["Hi"]}
    recipe(prepared, valid_rows=8, **keys)
    folder, found = prepared / "runs/r/measured", []
    for ranks in (1, 2):
        code, said = minitron(
            "run", prepared / "recipe.yaml", "--until", "measured", f"execution.parallel_by_stage.measured.dp={ranks}"
        )
        assert code == 0, said
        found.append([(folder / name).read_text() for name in ("metrics.json", "answers.jsonl")])
        assert json.loads((folder / "manifest.json").read_text())["provenance"]["session"]["device"] == "cpu"
        shutil.rmtree(folder)
    assert found[0] == found[1]


def test_ranks_take_whole_models(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    split = made.model_copy(update={"execution": made.execution.model_copy(update={"parallel": Parallel(tp=2, dp=2)})})
    assert View(split).layout("measured") == Parallel(dp=4)
    assert View(made).layout("measured") == Parallel()


def test_the_template_of_a_training_on_rewards_is_known_before_it_runs(prepared: Path) -> None:
    """The toy teacher has no chat template; the trained model will have that of its training."""
    keys = ["stages.reinforce.inputs.model=teacher", "stages.reinforce.template=chatml"]
    made = load_recipe(REPO / "recipes/toy/reinforce.yaml", keys)
    measured = made.stages["evaluate_reinforce"]
    assert isinstance(measured, EvaluateChatStage)
    found = preflight.tokenizer_of(measured, made.stages, Store(prepared / "runs/r"))
    assert found == (prepared / "runs/r/teacher", "chatml")
