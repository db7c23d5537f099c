"""SteerLM 2.0: the sampling of answers, their three log-probabilities, and what the training gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.alignment import base
from nemo_minitron.backends.alignment.base import CURVES_FILE, LossPoint
from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.data.chat.templates import set_template
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError, Interrupted, PlanError
from nemo_minitron.evaluation import sampling
from nemo_minitron.evaluation.attribute_likelihood import (
    rating_log_prob,
)
from nemo_minitron.evaluation.sampling import Sampling
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.report.sampled_answers import sampled_answers as sampled_facts
from nemo_minitron.report.sampled_answers import sampled_table
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.align.params import Steerlm2Stage
from nemo_minitron.stages.align.run import Steerlm2Inputs, steerlm2
from nemo_minitron.stages.artifacts import ChatRows, Model, RewardModel, SampledAnswers
from nemo_minitron.stages.common.batch_file import SUFFIX, BatchFile
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.steerlm2_answers import run as stage
from nemo_minitron.stages.steerlm2_answers.params import Steerlm2AnswersStage
from nemo_minitron.stages.steerlm2_answers.prompts import select_prompts
from nemo_minitron.stages.steerlm2_answers.run import steerlm2_answers
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO, Cli
from tests.support.tiny_models import load_transformers, tiny_model_dir
from tests.unit.test_alignment_backend import TRAINED, FakeBackend

ANSWERS = ["Two.", "It is two and two, which makes four.", "No idea at all.", "4"]
Run = Callable[..., tuple[dict[str, Any], StageContext]]


class Ratings(FakeBackend):
    """Rates every text by its length, with a different value for each attribute."""

    def predict_rewards(self, reward_model_dir: Path, texts: Sequence[str], *_: Any) -> list[list[float]]:
        return [_rating(text) for text in texts]


def _rating(text: str) -> list[float]:
    return [(len(text) % 7 + index) / 4 for index in range(len(ATTRIBUTES))]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the stage with two tiny models, a fake backend, and answers from ANSWERS."""
    monkeypatch.setitem(base.BACKENDS, base.DEFAULT_BACKEND, f"{__name__}:Ratings")
    monkeypatch.setattr(sampling, "sampled_answers", _answers)
    monkeypatch.setattr("nemo_minitron.evaluation.agreement.require_agreement", lambda *_: None)
    roles = {"model": 0, "reference": 1}
    folders = {role: tiny_model_dir(tmp_path / role, "llama_gqa_tied", seed=seed) for role, seed in roles.items()}
    for folder in folders.values():
        set_template(folder, "chatml")
    chats = _chats(tmp_path)
    models = {role: Model(role, "", folder, "", {}) for role, folder in folders.items()}
    facts = {"reward": "regression", "template": "chatml", "whole_markers": True}
    inputs = stage.Inputs(**models, attribute_model=RewardModel("rates", "", folders["model"], "", facts), chats=chats)

    def call(name: str = "answers", **keys: Any) -> tuple[dict[str, Any], StageContext]:
        out, work = tmp_path / name, tmp_path / f"{name}.work"
        out.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        stop = StopRequest(work)
        ctx = StageContext(name, "test", out, work, Execution(device="cpu"), Progress(silent=True), stop=stop)
        used = stage.Inputs(**{**vars(inputs), **keys.pop("inputs", {})})
        sizes = {"answers_per_prompt": 3, "max_new_tokens": 60, "max_seq_len_tokens": 200, "batch_size": 6}
        params = Steerlm2AnswersStage(kind="steerlm2_answers", **{**sizes, **keys})
        return dict(steerlm2_answers(params, used, ctx)), ctx

    return call


def _chats(root: Path, attributes: dict[str, float] | None = None) -> ChatRows:
    folder = root / "chats"
    folder.mkdir(exist_ok=True)
    for part in ("train", "valid"):
        rows = []
        for number in range(5):
            messages = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What is {part} {number} and {number}?"},
                {"role": "assistant", "content": "An answer of a person."},
            ]
            rated = {"attributes": {"verbosity": number % 5, "helpfulness": 3.6} if attributes is None else attributes}
            rows.append({"messages": messages, **rated, "origin": f"{part}.jsonl:{number + 1}"})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatRows("chats", "", folder, "", {"rows": "conversations"})


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Any], settings: Sampling, seed: int) -> list[str | None]:
    """The first answer of a batch with more than two did not end, and the second is empty."""
    drawn: list[str | None] = [f" {ANSWERS[(seed + index) % len(ANSWERS)]}\n" for index in range(len(prompts))]
    if len(prompts) > 2:
        drawn[:2] = [None, " \n"]
    return drawn


def _rows(ctx: StageContext, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ctx.out_dir / f"{part}.jsonl").read_text().splitlines()]


@torch.no_grad()
def _log_prob(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """One token at a time."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    total = 0.0
    for place in range(len(ids), len(whole)):
        logits = model(torch.tensor([whole[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[whole[place]])
    return total


def test_the_three_log_probabilities_equal_plain_formulas(run: Run, tmp_path: Path) -> None:
    result, ctx = run(max_attempts=9)
    models = {role: tmp_path / role / "llama_gqa_tied" for role in ("model", "reference")}
    loaded = {role: load_transformers(folder) for role, folder in models.items()}
    tokenizer = load_tokenizer(models["model"])
    held_out, rows = _rows(ctx, "valid"), _rows(ctx, "train")
    assert len(rows) == result["train"]["rows"] == 5
    for row in (rows[0], rows[-1], held_out[0]):
        asked = row["prompt_turns"][0]["value"]
        start = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        values = {"helpfulness": 4, "verbosity": int(asked.split()[3])}
        label = ",".join(f"{name}:{value}" for name, value in values.items())
        assert (row["system"], row["label"]) == ("Be brief.", label)
        assert row["prompt"] == f"{start}Attributes: {label}\n"
        assert len(row["responses"]) == 3
        for response in row["responses"]:
            answer = response["value"] + "<|im_end|>"
            assert response["output"] == answer
            log_q = _log_prob(loaded["model"], tokenizer, row["prompt"], answer)
            assert response["log(Q(y|a,x))"] == pytest.approx(log_q, rel=1e-5)
            log_p = _log_prob(loaded["reference"], tokenizer, start, answer)
            assert response["log(P(y|x))"] == pytest.approx(log_p, rel=1e-5)
            predictions = dict(zip(ATTRIBUTES, _rating(f"{start}{answer}"), strict=True))
            log_a = sum(rating_log_prob(predictions[name], value) for name, value in values.items())
            assert response["log(P(a|x,y))"] == pytest.approx(log_a, rel=1e-5)


def test_unusable_answers_are_sampled_again_and_counted(run: Run) -> None:
    result, ctx = run(max_attempts=9)
    facts = result["train"]
    assert (facts["rows"], facts["left_out"]) == (5, 0)
    # Three batches of two, two and one prompts; in each one text did not end and one was empty.
    assert facts["drawn"] == 15 + 6
    assert facts["ended"] == pytest.approx(18 / 21)
    assert facts["lengths"]["rows"] == 5
    table = sampled_table(sampled_facts([SampledAnswers("answers", "", ctx.out_dir, "", result)]))
    assert table["rows"][0][:3] == ["answers", "5", "3"]


def test_prompts_with_too_few_answers_are_left_out(run: Run) -> None:
    result, ctx = run(max_attempts=1)
    assert result["train"]["left_out"] == 2 + 1
    assert result["train"]["rows"] == len(_rows(ctx, "train")) == 2


def test_an_interrupted_stage_goes_on_to_the_same_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = run("whole", max_attempts=9)
    drawn = 0

    def killed(*arguments: Any) -> list[str | None]:
        nonlocal drawn
        drawn += 1
        if drawn == 8:
            raise KeyboardInterrupt
        return _answers(*arguments)

    monkeypatch.setattr(sampling, "sampled_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        run("resumed", max_attempts=9)
    _, resumed = run("resumed", max_attempts=9)
    for part in ("train", "valid"):
        assert _rows(resumed, part) == _rows(whole, part)
    calls = drawn
    run("resumed", max_attempts=9)
    assert drawn == calls, "nothing is sampled twice"


@pytest.mark.parametrize("num_calls", [1, 8])
def test_a_stop_request_ends_the_stage_after_a_batch(
    num_calls: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, seen = tmp_path / "answers.work/STOP", []

    def stopping(*arguments: Any) -> list[str | None]:
        seen.append(arguments)
        if len(seen) == num_calls:
            stop.touch()
        return _answers(*arguments)

    monkeypatch.setattr(sampling, "sampled_answers", stopping)
    with pytest.raises(Interrupted, match="Stopped in stage answers as requested by the file STOP"):
        run(max_attempts=9)
    kept = BatchFile(stop.with_name(f"sampled{SUFFIX}")).num_done
    assert kept > 0
    stop.unlink()
    calls = len(seen)
    _, resumed = run(max_attempts=9)
    monkeypatch.setattr(sampling, "sampled_answers", _answers)
    _, whole = run("whole", max_attempts=9)
    assert _rows(resumed, "train") == _rows(whole, "train")
    assert len(seen) > calls, "the rest is sampled by the second run"


def test_attributes_of_the_stage_replace_those_of_the_rows(run: Run) -> None:
    _, ctx = run(attributes={"verbosity": 1, "quality": 4}, max_attempts=9, max_train_prompts=2)
    assert [row["label"] for row in _rows(ctx, "train")] == ["quality:4,verbosity:1"] * 2


@pytest.mark.parametrize("most", [None, 2, 4])
def test_bad_rows_are_limited_among_the_rows_that_were_read(most: int | None, tmp_path: Path) -> None:
    chats = _chats(tmp_path)
    rows = [json.loads(line) for line in chats.file("train").read_text().splitlines()]
    rows[1]["messages"][1]["content"] = "<|im_end|>"
    chats.file("train").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tiny_model_dir(tmp_path, "llama_gqa_tied")
    set_template(folder, "chatml")
    template = ChatTemplate.load(folder, "chatml")
    sizes: dict[str, Any] = {"answers_per_prompt": 3, "max_new_tokens": 60, "max_seq_len_tokens": 200}
    params = Steerlm2AnswersStage(kind="steerlm2_answers", **sizes, max_train_prompts=most)
    with pytest.raises(DataError, match=f"1 of {3 if most == 2 else 5} rows are bad"):
        select_prompts(params, template, chats, "stages.test")
    allowed = params.model_copy(update={"max_bad_fraction": 0.34})
    found = select_prompts(allowed, template, chats, "stages.test")
    assert found.counts["train"] == {"prompts": most or 4, "repeated": 0, "too_long": 0, "bad": 1}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_new_tokens": 199}, "No prompt of the train part is left: 5 leave no room for max_new_tokens = 199"),
        ({"max_attempts": 1, "batch_size": 3}, "None of the 5 prompts of the train part got 3 usable answers in 1"),
        ({"template": "model", "inputs": "unrated"}, "the row has no attributes, and `attributes` of the stage"),
        ({"inputs": "other template"}, "differ in the tokenizer's chat template"),
        ({"inputs": "other tokenizer"}, "differ in the tokenizer's vocab"),
        ({"inputs": "ranking"}, "needs an attribute model that was trained by regression"),
    ],
)
def test_bad_inputs_are_named(keys: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    what = keys.get("inputs")
    if what is not None:
        reference = tmp_path / "reference" / "llama_gqa_tied"
        if what == "unrated":
            keys = {"inputs": {"chats": _chats(tmp_path, {})}}
        elif what == "other template":
            set_template(reference, "extra_id")
            keys = {"whole_markers": False}
        elif what == "other tokenizer":
            file = reference / "tokenizer.json"
            content = json.loads(file.read_text())
            vocab = content["model"]["vocab"]
            one, other = list(vocab)[-2:]
            vocab[one], vocab[other] = vocab[other], vocab[one]
            file.write_text(json.dumps(content))
            keys = {"inputs": {}}
        else:
            keys = {"inputs": {"attribute_model": RewardModel("r", "", reference, "", {"reward": "ranking"})}}
    with pytest.raises((DataError, PlanError), match=message.replace("(", r"\(")):
        run(**keys)


def test_a_model_without_attributes_cannot_be_asked_for_them(run: Run, tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path / "plain", "llama_gqa_tied")
    with pytest.raises(DataError, match="has no attributes, so the prompts cannot request any"):
        run(inputs={role: Model(role, "", folder, "", {}) for role in ("model", "reference")})


def _answers_artifact(ctx: StageContext, result: dict[str, Any]) -> SampledAnswers:
    return SampledAnswers("answers", "", ctx.out_dir, "", result)


def test_the_training_gets_the_rows_as_they_are(run: Run, tmp_path: Path) -> None:
    TRAINED.clear()
    result, sampled = run(max_attempts=9)
    model = Model("model", "", tmp_path / "model" / "llama_gqa_tied", "", {})
    answers = _answers_artifact(sampled, result)
    sizes: dict[str, Any] = {"global_batch_size": 2, "max_seq_len_tokens": 200, "lr": 1e-4}
    out, work = tmp_path / "trained", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    ctx = StageContext("steerlm2", "test", out, work, Execution(device="cpu"), Progress(silent=True))
    trained = steerlm2(Steerlm2Stage(kind="steerlm2", **sizes), Steerlm2Inputs(model, answers), ctx)
    (training,) = TRAINED
    assert training.objective == base.AnswerWeightsObjective(3)
    assert (training.train_rows, training.num_train_rows) == (sampled.out_dir / "train.jsonl", 5)
    assert training.num_steps == 2
    assert trained["method"] == "steerlm2"
    assert trained["lengths"]["train"]["rows"] == 5
    for key, value, message in (
        ("global_batch_size", 6, "has answers to 5 prompts of the train part, and a batch takes 6"),
        ("max_seq_len_tokens", 199, "They would be cut off"),
    ):
        with pytest.raises(DataError, match=message):
            steerlm2(Steerlm2Stage(kind="steerlm2", **{**sizes, key: value}), Steerlm2Inputs(model, answers), ctx)


def test_the_curve_is_the_distance_and_not_the_loss(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "train/loss": 9.0, "train/distance": 2.0},
        {"step": 1, "val/loss": 9.0, "val/distance": 1.5},
    ]
    (tmp_path / CURVES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = base.alignment_backend("nemo_aligner").read_curve(tmp_path / CURVES_FILE)
    assert found == [LossPoint(1, 2.0, None), LossPoint(1, None, 1.5)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steerlm2_answers.answers_per_prompt=1", "greater than or equal to 2"),
        ("steerlm2_answers.attributes={verbosity: 5}", "less than or equal to 4"),
        ("steerlm2_answers.attributes={wit: 3}", "wit"),
        ("steerlm2_answers.max_new_tokens=256", "leaves no tokens of max_seq_len_tokens for a prompt"),
        ("steerlm2_answers.max_seq_len_tokens=100000", "positions"),
        ("steerlm2_answers.max_valid_prompts=8", "stage steerlm2_answers has max_valid_prompts = 8"),
        ("attribute_model.reward=ranking", "has reward = ranking, and steerlm2_answers needs regression"),
        ("rated.valid_rows=0", "held-out prompts are needed"),
        ("steerlm2.max_seq_len_tokens=128", "its answers would be cut off"),
        ("steerlm2.min_lr=1.0", "above lr"),
        ("steerlm2.aligner.model.steerlm2.micro_batch_size=3", "set by the stage"),
        ("steerlm2.aligner.model.optim.weight_dekay=0.0", "Did you mean model.optim.weight_decay"),
        ("steerlm2.inputs.answers=rated", "rated"),
    ],
)
def test_check_names_what_is_wrong(override: str, message: str, minitron: Cli, tmp_path: Path) -> None:
    code, output = minitron(
        "check", REPO / "recipes/toy/steerlm2.yaml", f"execution.run_root={tmp_path}", f"stages.{override}"
    )
    assert code == 2, output
    assert message in " ".join(output.split())


def test_micro_batches_count_answers(minitron: Cli, tmp_path: Path) -> None:
    recipe = (REPO / "recipes/toy/steerlm2.yaml", f"execution.run_root={tmp_path}")
    code, output = minitron("check", *recipe, "execution.parallel_by_stage={steerlm2: {micro_batch_size: 3}}")
    assert code == 2
    assert "micro_batch_size = 3 counts answers here" in " ".join(output.split())
    code, output = minitron("check", *recipe, "execution.parallel_by_stage={steerlm2: {micro_batch_size: 128}}")
    assert code == 0, output
