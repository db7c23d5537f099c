"""Alignment stages need an alignment backend, and no particular one."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.backends.alignment import base
from nemo_minitron.backends.alignment.base import CURVES_FILE, LossPoint, TaskContext, Training
from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.errors import ConfigError
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Execution, Parallel
from nemo_minitron.stages.align import run as align
from nemo_minitron.stages.align.params import AttributeModelStage, DpoStage, SftStage
from nemo_minitron.stages.align.run import dpo, sft, train_attribute_model
from nemo_minitron.stages.annotate import run as rating
from nemo_minitron.stages.annotate.params import AnnotateStage
from nemo_minitron.stages.annotate.run import annotate
from nemo_minitron.stages.artifacts import ChatRows, Model, RewardModel
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.distill_offline import run as offline
from nemo_minitron.stages.distill_offline.params import DistillOfflineStage
from nemo_minitron.stages.distill_offline.run import distill_offline
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO
from tests.support.tiny_models import load_transformers, tiny_model_dir

PACKAGE = REPO / "nemo_minitron"
TRAINED: list[Training] = []
T = TypeVar("T", bound=Artifact)
SIZES: dict[str, Any] = {"global_batch_size": 2, "max_seq_len_tokens": 128, "lr": 1e-3, "template": "chatml"}


class FakeBackend(base.AlignmentBackend):
    """Copies the input model, and rates every text by its length."""

    def is_installed(self) -> bool:
        return True

    def override_problems(self, method: base.Method, overrides: Mapping[str, Any]) -> Iterator[str]:
        return iter(())

    def model_problems(self, shape: ModelShape, layout: Parallel) -> Iterator[str]:
        return iter(())

    def train(self, training: Training, out_dir: Path, context: TaskContext) -> list[LossPoint]:
        TRAINED.append(training)
        assert all(file.stat().st_size for file in (training.train_rows, training.valid_rows))
        shutil.copytree(training.model_dir, out_dir, dirs_exist_ok=True)
        lines = [f"{step} {1 / step}" for step in range(1, training.num_steps + 1)]
        (out_dir / CURVES_FILE).write_text("\n".join(lines))
        return self.read_curve(out_dir / CURVES_FILE)

    def read_curve(self, file: Path) -> list[LossPoint]:
        rows = [line.split() for line in file.read_text().splitlines()]
        return [LossPoint(int(step), float(loss), 2 * float(loss)) for step, loss in rows]

    def predict_rewards(
        self, reward_model_dir: Path, texts: Sequence[str], batch_size: int, context: TaskContext
    ) -> list[list[float]]:
        return [[float(len(text) % 5)] * len(ATTRIBUTES) for text in texts]

    def reward_tokenizer(self, reward_model_dir: Path) -> Path:
        return reward_model_dir


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    TRAINED.clear()
    monkeypatch.setitem(base.BACKENDS, base.DEFAULT_BACKEND, f"{__name__}:FakeBackend")
    # A stage that looked for NeMo-Aligner anyway would fail.
    monkeypatch.setenv("MINITRON_ALIGNER_PYTHON", "/nowhere")


with_fake = pytest.mark.usefixtures("_fake")


def _artifact(artifact: type[T], path: Path, **result: Any) -> T:
    return artifact(stage=path.name, kind="", path=path, fingerprint="", result=result)


def _chats(root: Path, kind: str) -> ChatRows:
    """Six conversations or pairs as a chat_data stage publishes them."""
    folder = root / kind
    folder.mkdir()
    for part in ("train", "valid"):
        rows = []
        for number in range(6):
            asked = {"role": "user", "content": f"What is {number} and {number}?"}
            answers = [{"role": "assistant", "content": text} for text in (str(2 * number), "No idea.")]
            row: dict[str, Any] = {"messages": [asked, answers[0]], "attributes": {"helpfulness": number % 5}}
            if kind == "pairs":
                row = {"prompt": [asked], "chosen": answers[0]["content"], "rejected": answers[1]["content"]}
            rows.append({**row, "origin": f"x.jsonl:{number + 1}"})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _artifact(ChatRows, folder, rows=kind)


def _context(root: Path, name: str) -> StageContext:
    out, work = root / name, root / f"work_{name}"
    out.mkdir()
    work.mkdir()
    return StageContext(name, "test", out, work, Execution(device="cpu"), Progress(silent=True))


@with_fake
def test_fine_tuning_publishes_the_model_that_the_backend_has_trained(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path, "llama_gqa_tied")
    ctx = _context(tmp_path, "sft")
    inputs = align.Inputs(_artifact(Model, model), _chats(tmp_path, "conversations"))
    result = sft(SftStage(kind="sft", num_epochs=2, **SIZES), inputs, ctx)
    assert (result["method"], result["num_steps"], result["first_loss"]) == ("sft", 6, 1.0)
    assert (result["first_valid_loss"], result["valid_loss"]) == (2.0, pytest.approx(2 / 6))
    assert result["lengths"]["train"]["rows"] == 6
    assert load_transformers(ctx.out_dir).config.num_hidden_layers == result["shape"]["num_layers"]
    assert "<|im_start|>" in (ctx.out_dir / "chat_template.jinja").read_text()


@with_fake
def test_a_warmup_as_long_as_its_epochs_is_refused_before_the_training(tmp_path: Path) -> None:
    inputs = align.Inputs(
        _artifact(Model, tiny_model_dir(tmp_path, "llama_gqa_tied")), _chats(tmp_path, "conversations")
    )
    params = SftStage(kind="sft", num_epochs=2, warmup_steps=6, **SIZES)
    with pytest.raises(ConfigError, match="6 steps of warmup, and the training has 6: 6 rows, 2 in a batch"):
        sft(params, inputs, _context(tmp_path, "sft"))
    assert not TRAINED


@with_fake
def test_a_preference_stage_passes_its_loss_and_pairs(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path, "llama_gqa_tied")
    inputs = align.Inputs(_artifact(Model, model), _chats(tmp_path, "pairs"))
    dpo(DpoStage(kind="dpo", preference_loss="ipo", beta=0.3, **SIZES), inputs, _context(tmp_path, "dpo"))
    (training,) = TRAINED
    assert training.objective == base.PreferenceObjective("ipo", 0.3, 1.0, 0.0, False)
    row = json.loads(training.train_rows.read_text().splitlines()[0])
    assert set(row) >= {"prompt", "chosen_response", "rejected_response"}


@with_fake
def test_an_offline_distillation_passes_its_teacher(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path, "llama_gqa_tied")
    teacher = _artifact(Model, model)
    inputs = offline.Inputs(teacher, teacher, _chats(tmp_path, "conversations"))
    params = DistillOfflineStage(kind="distill_offline", top_k=7, **SIZES)
    result = distill_offline(params, inputs, _context(tmp_path, "distill_offline"))
    assert TRAINED[0].objective == base.TeacherObjective(model, 7, "fwd_kl", 1.0, 0.0)
    assert result["method"] == "knowledge_distillation"


@with_fake
def test_answers_are_rated_by_the_reward_model_of_the_backend(tmp_path: Path) -> None:
    model, chats = tiny_model_dir(tmp_path, "llama_gqa_tied"), _chats(tmp_path, "conversations")
    ctx = _context(tmp_path, "reward")
    params = AttributeModelStage(kind="train_attribute_model", **SIZES)
    trained = train_attribute_model(params, align.Inputs(_artifact(Model, model), chats), ctx)
    assert TRAINED[0].objective == base.RewardObjective("regression", len(ATTRIBUTES))
    assert "helpfulness" in trained["agreement"]
    rated = _context(tmp_path, "rated")
    reward_model = _artifact(RewardModel, ctx.out_dir, **trained)
    annotate(AnnotateStage(kind="annotate"), rating.Inputs(reward_model, chats), rated)
    row = json.loads((rated.out_dir / "train.jsonl").read_text().splitlines()[1])
    assert row["attributes"]["helpfulness"] == 1, "ratings of people stay"
    assert set(row["attributes"]) == set(ATTRIBUTES)


def test_curves_of_nemo_aligner_are_read_under_our_names(tmp_path: Path) -> None:
    valid = {"step": 1, "val/loss": 1.5, "val/loss_se": 0.5}
    rows = [{"step": 1, "train/loss": 2.0, "train/lr": 1.0}, valid, {"step": 2, "time": 3.0}]
    (tmp_path / CURVES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = base.alignment_backend("nemo_aligner").read_curve(tmp_path / CURVES_FILE)
    assert found == [LossPoint(1, 2.0, None), LossPoint(1, None, 1.5, 0.5), LossPoint(2, None, None)]


@pytest.mark.parametrize("package", ["stages", "plan", "report"])
def test_nothing_above_the_interface_names_nemo_aligner(package: str) -> None:
    foreign = re.compile(r"""["'](trainer|model|exp_manager|pretrained_checkpoint)\.|val/loss|NeMo's format""")
    for file in (PACKAGE / package).rglob("*.py"):
        text = file.read_text()
        assert not foreign.search(text), file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert "nemo_aligner" not in (node.module or ""), file
