"""The interface between the alignment stages and the package that trains for them, and the list of such packages.

A backend is a folder beside this file and one line in BACKENDS. A stage passes model folders, files of rows and plain
values; the backend's own config keys, checkpoint formats, file names and names of metrics stay in its folder. Importing
this module is cheap: `minitron check` uses it, so it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel

if TYPE_CHECKING:
    from nemo_minitron.system.interrupts import StopRequest
    from nemo_minitron.system.progress import Progress

Method = Literal["sft", "dpo", "reward_model", "knowledge_distillation", "steerlm2", "reinforce", "ppo"]
"""A kind of training; recorded as `method` in the results of a stage."""
CURVES_FILE, ANSWERS_FILE = "curves.jsonl", "answers.jsonl"
"""Files in a published folder: the metrics of a training, one JSON line for each step (`read_curve` reads it), and the
answers to held-out prompts of a training on rewards."""


@dataclass(frozen=True)
class SftObjective:
    """Cross-entropy of the answers. Rows: {"input", "output"}."""

    method: ClassVar[Method] = "sft"


@dataclass(frozen=True)
class PreferenceObjective:
    """Preference loss against the frozen input model.

    Rows: {"prompt", "chosen_response", "rejected_response"}; the RPO losses also need "chosen_reward" and
    "rejected_reward".
    """

    loss: Literal["dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"]
    beta: float
    """Weight of the KL penalty against the reference."""
    reward_scale: float
    """Factor eta on the difference of the rewards (RPO losses, 2406.11704)."""
    sft_loss_weight: float
    """Weight of the next-token loss on the chosen answer."""
    average_log_probs: bool
    """Whether log-probabilities are averaged, instead of summed, over the tokens of an answer."""
    method: ClassVar[Method] = "dpo"


@dataclass(frozen=True)
class RewardObjective:
    """Loss of a reward model.

    Rows of a regression: {"text", "label"}, with one number for each attribute. Rows of a ranking: {"text"}, the chosen
    answer of a pair and, in the next line, the rejected one.
    """

    reward: Literal["regression", "ranking"]
    num_outputs: int
    """Numbers that the model predicts for a text."""
    method: ClassVar[Method] = "reward_model"


@dataclass(frozen=True)
class TeacherObjective:
    """Distillation from cached top logits of a teacher. Rows: {"input", "output"}."""

    teacher_dir: Path
    """Hugging Face folder of the teacher."""
    top_k: int
    """Cached logits of each token; the loss is over these, renormalized."""
    kd_loss: Literal["fwd_kl", "bwd_kl"]
    kd_loss_weight: float
    sft_loss_weight: float
    """Weight of the next-token loss on the answers."""
    method: ClassVar[Method] = "knowledge_distillation"


@dataclass(frozen=True)
class AnswerWeightsObjective:
    """Loss of SteerLM 2.0 (2406.08673, section 4.5): KL divergence of the model's weights of sampled answers from w'.

    Rows: {"prompt", "responses": [{"output", "log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))"}]}, the same number of
    answers in every row. The points of the curve are this divergence in nats.
    """

    answers_per_prompt: int
    method: ClassVar[Method] = "steerlm2"


Objective = SftObjective | PreferenceObjective | RewardObjective | TeacherObjective | AnswerWeightsObjective


@dataclass(frozen=True)
class Training:
    """One training: the model, its objective and rows, and the hyperparameters that every backend has."""

    model_dir: Path
    """Hugging Face folder of the model to start from."""
    objective: Objective
    train_rows: Path
    """JSON lines in the form that the objective names."""
    valid_rows: Path
    num_train_rows: int
    """Training rows that a batch counts: a pair of a ranking is one."""
    num_steps: int
    global_batch_size: int
    max_seq_len_tokens: int
    lr: float
    min_lr: float
    warmup_steps: int
    valid_interval_steps: int
    """Steps between validations, which also write a checkpoint."""
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the backend's own config, nested, from the recipe; checked by `override_problems`."""


@dataclass(frozen=True)
class Critic:
    """Settings of PPO, whose critic starts from the model to train, with a new head."""

    lr: float
    min_lr: float
    warmup_steps: int
    """Steps before the first one in which only the critic is trained."""
    ratio_clip: float
    value_clip: float
    """Clipping of the critic's loss; 0: none."""
    discount_factor: float
    gae_lambda: float
    entropy_bonus: float


@dataclass(frozen=True)
class ModelReward:
    """A trained reward model whose output is a part of the reward."""

    model_dir: Path
    """The `out_dir` of its training."""
    weight: float
    """Factor of its output in the sum of the rewards."""
    attribute_weights: Sequence[float] | None
    """Weights of its outputs in one number; None: it has a single output."""


@dataclass(frozen=True)
class Rollouts:
    """One training on rewards of the model's own answers."""

    method: Literal["reinforce", "ppo"]
    critic: Critic | None
    """Settings of the critic, which only ppo has."""
    model_dir: Path
    """Hugging Face folder of the model to start from; the KL divergence is measured against it."""
    train_prompts: Path
    """JSON lines {"text": prompt with all special tokens, ...}; other keys are for the evaluator."""
    valid_prompts: Path
    num_train_prompts: int
    stop: str
    """Text that ends an answer."""
    evaluator: Sequence[str]
    """Command of the process that computes rewards (evaluation/reward_worker.py); empty: no program computes any."""
    reward_model: ModelReward | None
    """Reward model whose output is added to the rewards of the evaluator."""
    num_steps: int
    prompts_per_step: int
    answers_per_prompt: int
    global_batch_size: int
    """Answers per optimizer step."""
    generation_batch_size: int
    """Answers that one process generates at a time."""
    num_valid_prompts: int
    max_seq_len_tokens: int
    max_new_tokens: int
    temperature: float
    kl_penalty: float
    lr: float
    min_lr: float
    warmup_steps: int
    valid_interval_steps: int
    """Steps between validations, which also write a checkpoint."""
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the backend's own config, nested, from the recipe; checked by `override_problems`."""


@dataclass(frozen=True)
class TaskContext:
    """Where and how a backend works for one stage."""

    stage: str
    """Name of the stage in the recipe, for error messages."""
    work_dir: Path
    """Folder of the stage that survives a kill. The backend resumes from the files that it finds there."""
    layout: Parallel
    device: Literal["auto", "cpu", "cuda"]
    threads: int | None
    """Threads of each process; None: chosen from the cores and processes of the machine."""
    progress: Progress
    stop: StopRequest


@dataclass(frozen=True)
class LossPoint:
    """One line of a curve."""

    step: int
    train: float | None
    """Training loss; None in a line that has none, such as that of a validation."""
    valid: float | None
    """Validation loss; None in a line that has none. Step 0 is the model before the training."""
    valid_se: float | None = None
    """Standard error of the validation loss over its batches; None for a single batch."""


class AlignmentBackend(Protocol):
    """A package that trains language models on conversations, preferences, ratings or a teacher's logits."""

    def is_installed(self) -> bool:
        """Return whether the package can be used on this machine."""
        ...

    def override_problems(self, method: Method, overrides: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is wrong with the overrides of a recipe: unknown keys and bad values, one line each."""
        ...

    def model_problems(self, shape: ModelShape, layout: Parallel) -> Iterator[str]:
        """Yield why the package cannot train a model of this shape in this layout, one line each."""
        ...

    def train(self, training: Training, out_dir: Path, context: TaskContext) -> list[LossPoint]:
        """Train to the end and write the model to `out_dir`, with CURVES_FILE and the complete config beside it.

        A language model is written as a Hugging Face checkpoint, with the tokenizer, dtype and config of the model that
        it started from. A reward model is written in a form that only `predict_rewards` and `reward_tokenizer` read.

        Returns:
            The points of the curve, in order.

        Raises:
            ConfigError: an unknown override, or a model that the package does not support.
            EnvironmentProblem: the package is not installed, or the training failed.
            Interrupted: a stop was requested; the same call resumes.
        """
        ...

    def train_on_rewards(self, rollouts: Rollouts, out_dir: Path, context: TaskContext) -> list[dict[str, float]]:
        """Train to the end and write a Hugging Face model to `out_dir`, with CURVES_FILE and ANSWERS_FILE beside it.

        Returns:
            The lines of CURVES_FILE: "step" (0: before the first), and the metrics that docs/how-to/alignment.md lists.

        Raises:
            As `train`; also EnvironmentProblem if the server of rewards ended or refused an answer.
        """
        ...

    def read_curve(self, file: Path) -> list[LossPoint]:
        """Read the CURVES_FILE of a published training."""
        ...

    def predict_rewards(
        self, reward_model_dir: Path, texts: Sequence[str], batch_size: int, context: TaskContext
    ) -> list[list[float]]:
        """Return the outputs of a trained reward model for each text, [texts][outputs]; runs in one process.

        Args:
            reward_model_dir: the `out_dir` of its training.

        Raises:
            EnvironmentProblem: the package is not installed, or the prediction failed.
            Interrupted: a stop was requested.
        """
        ...

    def reward_tokenizer(self, reward_model_dir: Path) -> Path:
        """Return the folder of a reward model's tokenizer, in Hugging Face's form."""
        ...


BACKENDS: dict[str, str] = {
    "nemo_aligner": "nemo_minitron.backends.alignment.nemo_aligner.backend:NemoAligner",
}
"""Name -> `module:class`; the module is imported when its backend is used."""
DEFAULT_BACKEND = "nemo_aligner"


def alignment_backend(name: str = DEFAULT_BACKEND) -> AlignmentBackend:
    """Return a backend of BACKENDS. No key of a recipe names one yet: stages use the default."""
    module, class_name = BACKENDS[name].split(":")
    return cast(AlignmentBackend, getattr(import_module(module), class_name)())
