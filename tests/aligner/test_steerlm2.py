"""SteerLM 2.0 by NeMo-Aligner on the CPU: its tensors, losses and steps against plain formulas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.data.chat.templates import set_template
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.evaluation import sampling
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.stages.artifacts import ChatRows
from nemo_minitron.stages.steerlm2_answers.params import Steerlm2AnswersStage
from nemo_minitron.stages.steerlm2_answers.prompts import select_prompts
from nemo_minitron.stages.steerlm2_answers.rows import write_part
from nemo_minitron.stages.steerlm2_answers.sampling import AnswerReader, sample_batch
from tests.support.aligner import Border, Layout, losses, quiet, train, training_config
from tests.support.tiny_models import load_transformers, tiny_model_dir

pytestmark = pytest.mark.slow
NUM_PROMPTS, NUM_ANSWERS, SEQ_LEN_TOKENS = 4, 3, 256
ANSWERS = ("It is right.", "No", "Four letters, which I counted one by one.")
CLIP = 1.0
"""Largest norm of a gradient; configs/align/steerlm2.yaml."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Border:
    """A width-pruned shape."""
    root = tmp_path_factory.mktemp("student")
    return Border(tiny_model_dir(root, "llama_gqa_tied", head_dim=16), root / "work", SEQ_LEN_TOKENS).cross()


@pytest.fixture(scope="module")
def rows(student: Border, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the stage in the template extra_id; the reference and the attribute model prefer some answers."""
    root = tmp_path_factory.mktemp("rows")
    set_template(student.model, "extra_id")
    template = ChatTemplate.load(student.model, "extra_id", whole_markers=False)
    params = Steerlm2AnswersStage(
        kind="steerlm2_answers",
        answers_per_prompt=NUM_ANSWERS,
        max_new_tokens=40,
        max_seq_len_tokens=SEQ_LEN_TOKENS,
        whole_markers=False,
    )
    prompts = select_prompts(params, template, _chats(root), "stages.test").all[:NUM_PROMPTS]
    reader = AnswerReader(params, template, template)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampling, "sampled_answers", lambda *_: list(ANSWERS * NUM_PROMPTS))
        records = sample_batch(prompts, 0, reader, load_transformers(student.model))
    reference = [[0.5 * index + value for index, value in enumerate(record["log_q"])] for record in records]
    ratings = [[[1.0 + index] * 9 for index in range(NUM_ANSWERS)]] * NUM_PROMPTS
    file = root / "rows.jsonl"
    write_part(file, zip(prompts, records, reference, ratings, strict=True))
    return file


def _chats(root: Path) -> ChatRows:
    for part in ("train", "valid"):
        lines = []
        for number in range(NUM_PROMPTS):
            turns = [("user", f"What is {number} in {part}?"), ("assistant", "Ask again."), ("user", "And now?")]
            system = [("system", "Be brief.")] if number % 2 else []
            messages = [{"role": role, "content": text} for role, text in [*system, *turns, ("assistant", "x")]]
            row = {"messages": messages, "attributes": {"verbosity": number, "helpfulness": 3}}
            lines.append(json.dumps({**row, "origin": f"{part}:{number}"}) + "\n")
        (root / f"{part}.jsonl").write_text("".join(lines))
    return ChatRows("chats", "", root, "", {"rows": "conversations"})


def _config(student: Border, rows: Path, work: Path, *, steps: int, layout: Layout, **keys: Any) -> dict[str, Any]:
    more = {"model.optim.weight_decay": 0.0, "model.encoder_seq_length": SEQ_LEN_TOKENS}
    more |= {f"model.data.{part}.max_seq_length": SEQ_LEN_TOKENS for part in ("train_ds", "validation_ds")}
    more |= {f"model.{name.replace('__', '.')}": keys[name] for name in keys}
    return training_config("steerlm2", student.nemo, rows, work, num_steps=steps, layout=layout, keys=more)


def _batch(student: Border, rows: Path, work: Path, *, renders: bool) -> dict[str, torch.Tensor]:
    config = _config(student, rows, work, steps=1, layout=Layout(), data__chat=renders)
    task = {"config": config, "nemo": str(student.nemo), "out": str(work / "batch.safetensors")}
    run_task("steerlm2_batch", task, work, work / "log.txt", *quiet())
    return load_file(work / "batch.safetensors")


def test_the_published_rows_are_read_by_nemo_aligner_and_mean_the_same_tokens(
    student: Border, rows: Path, tmp_path: Path
) -> None:
    ours, theirs = (_batch(student, rows, tmp_path / str(renders), renders=renders) for renders in (False, True))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    weights = torch.tensor([_logs(row, "log(P(a|x,y))", "log(P(y|x))", "-log(Q(y|a,x))") for row in read]).softmax(-1)
    torch.testing.assert_close(ours["ws"], weights.flatten().float(), atol=1e-5, rtol=0.0)
    tokenizer = load_tokenizer(student.model)
    for number, (row, response) in enumerate((each, answer) for each in read for answer in each["responses"]):
        before, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + response["output"]))
        assert ours["tokens"][number, : len(whole) - 1].tolist() == whole[:-1]
        assert ours["loss_mask"][number].nonzero().flatten().tolist() == list(range(len(before) - 1, len(whole) - 1))


def _logs(row: dict[str, Any], *names: str) -> list[float]:
    """Sum of log-probabilities of each answer; a name with a minus is subtracted."""
    out = []
    for response in row["responses"]:
        out.append(sum(-response[name[1:]] if name.startswith("-") else response[name] for name in names))
    return out


@pytest.mark.parametrize(
    ("layout", "micro_batch_size"),
    [
        (Layout(), 1),
        (Layout(), 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((Layout(tp=2), 3), (Layout(pp=2), 3), (Layout(dp=2), 2))
        ),
    ],
    ids=["one", "micro-batches of several prompts", "tp2", "pp2", "dp2"],
)
def test_loss_gradient_and_steps_equal_plain_formulas(
    layout: Layout, micro_batch_size: int, student: Border, rows: Path, tmp_path: Path
) -> None:
    sizes = dict.fromkeys(("steerlm2__micro_batch_size", "steerlm2__forward_micro_batch_size"), micro_batch_size)
    rates = {"optim__lr": 1e-4, "optim__sched__min_lr": 1e-5}
    work = tmp_path / "work"
    found = train(
        "steerlm2", _config(student, rows, work, steps=3, layout=layout, **sizes, **rates), student.nemo, work, layout
    )
    expected = _plain_training(student, rows, losses(found, "train/lr"))
    for name, values in expected.items():
        assert losses(found, f"train/{name}") == pytest.approx(values, rel=1e-4, abs=1e-5), name


def _plain_training(student: Border, rows: Path, rates: Sequence[float]) -> dict[str, list[float]]:
    """Loss, distance and norm of the gradient of each step (2406.08673, section 4.5), in transformers."""
    model = load_transformers(student.model)
    tokenizer = load_tokenizer(student.model)
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    out: dict[str, list[float]] = {"loss": [], "distance": [], "grad_norm": []}
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss, distance = torch.zeros(()), 0.0
        for row in read:
            own, sizes = _answer_log_probs(model, tokenizer, row)
            sampled = torch.tensor(_logs(row, "log(Q(y|a,x))"))
            wanted = torch.tensor(_logs(row, "log(P(a|x,y))", "log(P(y|x))", "-log(Q(y|a,x))")).softmax(-1)
            baseline = (own.detach() - sampled).softmax(-1)
            # NeMo-Aligner divides by the mean number of tokens of an answer, and adds 1e-8 to weights for the distance.
            loss = loss - ((wanted - baseline) * own).sum() / (sum(sizes) / len(sizes)) / len(read)
            distance += float(((wanted + 1e-8) * ((wanted + 1e-8) / (baseline + 1e-8)).log()).sum()) / len(read)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        for name, value in (("loss", loss), ("distance", distance), ("grad_norm", norm)):
            out[name].append(float(torch.as_tensor(value).detach()))
    return out


def _answer_log_probs(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """Log-probability of each answer with the end of its turn, and their numbers of tokens."""
    found, sizes = [], []
    for response in row["responses"]:
        before, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + response["output"]))
        each = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])
        found.append(each[len(before) - 1 :].sum())
        sizes.append(len(whole) - len(before))
    return torch.stack(found), sizes


def test_the_model_moves_towards_the_answers_that_fit_and_comes_back(
    student: Border, rows: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    found = train("steerlm2", _config(student, rows, work, steps=12, layout=Layout()), student.nemo, work)
    assert losses(found, "val/distance")[-1] < 0.5 * losses(found, "train/distance")[0]
    tokens = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    exported = student.back(tmp_path / "hf", work / "trained")
    with torch.no_grad():
        logits = load_transformers(exported)(tokens).logits
    torch.testing.assert_close(student.logits(tokens, work / "trained"), logits, atol=1e-4, rtol=0.0)
