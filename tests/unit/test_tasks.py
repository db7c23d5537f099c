"""lm-eval on offline data: the same scores as with lm-eval's own model, and errors for missing files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest

from nemo_minitron.errors import CheckpointError, DataError, EnvironmentProblem, PlanError
from nemo_minitron.evaluation.choice_task import _encode, load_choice_task
from nemo_minitron.evaluation.generation import load_for_inference
from nemo_minitron.evaluation.tasks import (
    FALLBACK_BATCH_SIZE,
    _require_no_tags,
    read_scores,
    run_tasks,
    write_offline_tasks,
)
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.system.progress import Progress
from tests.support.distributed import run_ranks
from tests.support.tiny_models import tiny_model_dir

pytest.importorskip("lm_eval")
SILENT = Progress(silent=True)
_WORDS = ("fox", "river", "the sea", "a large model", "rain falls", "small", "one", "hills and the river")
_PIQA = [
    {"goal": f"Where does {_WORDS[i]} run to?", "sol1": _WORDS[i - 1], "sol2": _WORDS[i - 3], "label": i % 2}
    for i in range(8)
]
_SCIQ = [
    {
        "question": f"What is {_WORDS[i]}?",
        "support": "The rain falls on the hills. " * (i % 3),
        "distractor1": _WORDS[i - 1],
        "distractor2": _WORDS[i - 2],
        "distractor3": _WORDS[i - 3],
        "correct_answer": _WORDS[i],
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with offline copies of two tasks."""
    root = tmp_path_factory.mktemp("tasks")
    for task, rows in (("piqa", _PIQA), ("sciq", _SCIQ)):
        (root / task).mkdir()
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(root / task / "validation.arrow", table.schema) as writer:
            writer.write_table(table)
    return root


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama_gqa_tied")


def _run(model_dir: Path, data_dir: Path, work: Path, *tasks: str, limit: int | None = None) -> Any:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    return run_tasks(model, tokenizer, tasks, data_dir=data_dir, limit=limit, work_dir=work, progress=SILENT).scores


def tasks_of_rank(ranks: int, model_dir: Path, data_dir: Path, work: Path) -> tuple[Any, int]:
    """Return the scores on this rank, and the number of answers that this rank has scored."""
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.evaluation import tasks
    from nemo_minitron.schema.execution import Parallel

    own, plain = [0], tasks.score_answers

    def counted(model: Any, pairs: Any, **options: Any) -> Any:
        own[0] += len(pairs)
        return plain(model, pairs, **options)

    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    options = {"data_dir": data_dir, "limit": None, "work_dir": work, "progress": SILENT}
    with patch.object(tasks, "score_answers", counted), open_session(Parallel(dp=ranks), device="cpu") as session:
        return run_tasks(model, tokenizer, ("piqa", "sciq"), session=session, **options).scores, own[0]


def test_ranks_share_out_the_questions(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    ((whole, all_answers),) = run_ranks(1, tasks_of_rank, 1, model_dir, data_dir, tmp_path)
    found = run_ranks(2, tasks_of_rank, 2, model_dir, data_dir, tmp_path)
    assert all_answers == 8 * 2 + 8 * 4
    assert [answers for _, answers in found] == [all_answers // 2] * 2
    scores, others = (scores for scores, _ in found)
    assert scores.keys() == whole.keys()
    assert all(scores[task] == pytest.approx(whole[task]) for task in whole)
    assert not others


def test_scores_equal_those_of_lm_evals_own_model(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = _run(model_dir, data_dir, tmp_path / "work", "piqa", "sciq")
    write_offline_tasks(["piqa", "sciq"], data_dir, tmp_path)
    reference = lm_eval.simple_evaluate(
        HFLM(str(model_dir), dtype="float32", device="cpu", batch_size=FALLBACK_BATCH_SIZE),
        tasks=["piqa_offline", "sciq_offline"],
        num_fewshot=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
    )
    for task in ("piqa", "sciq"):
        assert found[task] == read_scores(reference["results"][f"{task}_offline"])
        assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} == found[task].keys()


def test_contexts_longer_than_the_model_are_cut_as_lm_eval_cuts_them(data_dir: Path, tmp_path: Path) -> None:
    short = tiny_model_dir(tmp_path, "llama_gqa_tied", max_position_embeddings=16)
    found = _run(short, data_dir, tmp_path / "work", "sciq")
    assert 0 <= found["sciq"]["acc"] <= 1


def test_a_limit_takes_the_first_examples_and_nothing_is_left_behind(
    model_dir: Path, data_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    scores = _run(model_dir, data_dir, tmp_path, "piqa", limit=2)
    assert scores["piqa"]["acc"] in (0.0, 0.5, 1.0)
    assert list(tmp_path.iterdir()) == []
    assert {key: os.environ.get(key) for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")} == {
        key: before.get(key) for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_task_without_offline_data_is_named(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no offline data for task boolq") as caught:
        _run(model_dir, data_dir, tmp_path, "boolq")
    assert caught.value.allowed == "piqa, sciq"


def test_damaged_offline_data_is_named(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.arrow").write_bytes((data_dir / "piqa/validation.arrow").read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        _run(model_dir, tmp_path, tmp_path / "work", "piqa")


def test_without_lm_eval_the_error_names_the_solution(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentProblem, match="pip install"):
        _run(model_dir, data_dir, tmp_path, "piqa")
    with pytest.raises(EnvironmentProblem, match="take `task` out of layer_metrics"):
        load_choice_task("piqa", None, data_dir=data_dir, limit=None)


def test_only_numbers_are_kept_of_what_lm_eval_returns() -> None:
    result = {
        "alias": "piqa",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact_match,strict": 1,
        "sample_len": 8,
    }
    assert read_scores(result) == {"acc": 0.5, "exact_match,strict": 1.0}


def test_a_tag_has_no_score_of_its_own() -> None:
    with pytest.raises(PlanError, match="ai2_arc is a tag of lm-eval"):
        _require_no_tags(["piqa", "ai2_arc"], ["ai2_arc"])


def test_an_answer_without_a_question_follows_the_first_token(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    question, answer = _encode(tokenizer, "", "The fox runs.")
    assert question == (tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,)
    assert answer == tuple(tokenizer.encode("The fox runs.", add_special_tokens=False))
    assert len(answer) > 1
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(CheckpointError, match="neither a bos nor an eos token"):
        _encode(tokenizer, "", "The fox runs.")


def test_lm_eval_names_the_metrics_of_which_less_is_better(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    found = run_tasks(model, tokenizer, ("piqa",), data_dir=data_dir, limit=2, work_dir=tmp_path, progress=SILENT)
    assert found.scores["piqa"].keys() >= {"acc", "acc_norm"}
    assert found.lower_is_better == {}
