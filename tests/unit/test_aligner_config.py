"""Keys of NeMo-Aligner: NeMo-Aligner takes any, this package only those that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from nemo_minitron.backends.alignment.nemo_aligner.config import (
    NULLABLE,
    RANGES,
    TO_FILL,
    Method,
    base_config,
    complete_config,
    fixed_keys,
    flat,
    override_problems,
)
from nemo_minitron.errors import ConfigError
from tests.conftest import REPO, Cli

RECIPE = REPO / "recipes/toy/aligned.yaml"


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model.dpo.preference_avg_log_probs", True, "Use model.dpo.preference_average_log_probs"),
        ("model.dpo.average_log_probs", True, "Use model.dpo.preference_average_log_probs"),
        ("model.optim.weight_decy", 0.1, "Did you mean model.optim.weight_decay?"),
        ("model.optim.weight_decay", "much", "of another type"),
        ("model.optim.weight_decay", 3.0, "outside of [0.0, 1.0]"),
        ("model.sequence_parallel", 1, "of another type"),
        ("trainer.devices", 8, "set by the stage"),
        ("nothing.of.the.kind", 1, "unknown to NeMo-Aligner's dpo"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(key: str, value: Any, told: str) -> None:
    (problem,) = override_problems("dpo", nested(key, value))
    assert problem.startswith(key)
    assert told in problem


def test_keys_that_are_read_are_taken() -> None:
    overrides = {"model": {"optim": {"weight_decay": 0.0}, "dpo": {"sft_average_log_probs": True}}}
    assert not list(override_problems("dpo", overrides))


@pytest.mark.parametrize(
    ("method", "key", "value", "told"),
    [
        ("sft", "model.peft.peft_scheme", "lora", "LoRA is not supported, the stages train all weights. Allowed: "),
        ("ppo", "model.peft.peft_scheme", "sdlora", 'Allowed: "none"'),
        ("dpo", "model.peft.restore_from_path", "adapters", "Allowed: null"),
        ("steerlm2", "model.answer_only_loss", False, "Allowed: true"),
        ("sft", "model.data.train_ds.shuffle", False, "random order"),
        ("dpo", "trainer.dpo.limit_train_batches", 0.5, "num_steps or num_epochs of the stage"),
        ("dpo", "trainer.dpo.limit_train_batches", 1, "Allowed: 1.0"),
        ("reinforce", "trainer.max_time", "00:01:00:00", "limit the time of the job"),
        ("ppo_actor", "trainer.max_time", "00:01:00:00", "limit the time of the job"),
        ("reinforce", "remote_rm.reward_model.name", "mine", "have this name"),
        ("sft", "trainer.sft.limit_val_batches", 0, "leaves no batch"),
        ("sft", "trainer.sft.limit_val_batches", -0.5, "leaves no batch"),
    ],
)
def test_a_value_that_a_stage_would_ignore_is_refused(method: Method, key: str, value: Any, told: str) -> None:
    (problem,) = override_problems(method, nested(key, value))
    assert problem.startswith(f"{key} = ")
    assert told in problem


@pytest.mark.parametrize("method", get_args(Method))
def test_the_only_value_of_a_key_may_be_repeated(method: Method) -> None:
    base = flat(base_config(method))
    for key in fixed_keys(method):
        assert base[key] != TO_FILL
        assert not list(override_problems(method, nested(key, base[key])))


def test_adapters_are_for_the_programs_in_a_container() -> None:
    assert not list(override_problems("ppo_actor", nested("model.peft.peft_scheme", "lora")))


@pytest.mark.parametrize("method", get_args(Method))
def test_null_is_refused_where_a_number_is_needed(method: Method) -> None:
    for key, usual in flat(base_config(method)).items():
        name = key.rpartition(".")[2]
        if name in RANGES and usual != TO_FILL:
            problems = list(override_problems(method, nested(key, None)))
            assert len(problems) == (name not in NULLABLE), problems
            assert all(problem.startswith(f"{key} = null: ") for problem in problems)


def test_an_incomplete_config_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="no value for"):
        complete_config("sft", {}, {}, on_cpu=True, where="stages.sft")
    with pytest.raises(ConfigError, match="Did you mean"):
        complete_config("sft", {}, {"model": {"sed": 1}}, on_cpu=True, where="stages.sft")


def _check(minitron: Cli, tmp_path: Path, *overrides: str, recipe: Path = RECIPE) -> str:
    code, told = minitron("check", recipe, f"execution.run_root={tmp_path}", *overrides)
    assert code == 2, told
    return " ".join(told.split())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.dpo.aligner.model.dpo.preference_avg_log_probs=true", "preference_average_log_probs"),
        ("execution.parallel.cp=2", "cp = 2: stages.sft needs whole sequences"),
        ("stages.sft.global_batch_size=7", "not a multiple of micro_batch_size * dp = 4 * 1"),
        ("stages.sft.global_batch_size=32", "valid_rows = 24"),
        ("stages.dpo.inputs.chats=chat_data", "has rows: conversations, not pairs"),
        ("stages.sft.warmup_steps=40", "must be fewer than num_steps"),
        ("stages.sft.min_lr=1.0", "above lr"),
        ("+execution.parallel_by_stage.sft.pp=3", "the same number of layers in every pipeline stage"),
        ("stages.dpo.preference_loss=rpo", "rpo_bwd_kl"),
    ],
)
def test_check_names_what_is_wrong(override: str, told: str, minitron: Cli, tmp_path: Path) -> None:
    assert told in _check(minitron, tmp_path, override)


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"),
    [
        (
            "steerlm",
            ["steerlm_sft.global_batch_size=4096"],
            "4096: validation takes whole batches, and stage unrated has",
        ),
        ("steerlm", ["annotate.max_seq_len_tokens=4096"], "= 4096: the attribute model has 256 positions"),
        (
            "steerlm2",
            ["steerlm2_answers.max_seq_len_tokens=4096"],
            "= 4096: the model of inputs.attribute_model has 256 positions",
        ),
    ],
)
def test_check_names_what_is_wrong_with_attributes(
    recipe: str, overrides: list[str], told: str, minitron: Cli, tmp_path: Path
) -> None:
    keys = [f"stages.{override}" for override in overrides]
    assert told in _check(minitron, tmp_path, *keys, recipe=REPO / f"recipes/toy/{recipe}.yaml")


@pytest.mark.parametrize(
    ("recipe", "stage", "told"),
    [
        ("aligned", "sft", True),
        ("aligned", "dpo", False),  # NeMo-Aligner pads pairs to a multiple of tp
        ("steerlm", "attribute_model", True),
        ("steerlm2", "steerlm2", True),
        ("reinforce", "reinforce", True),
    ],
)
def test_sequence_parallelism_needs_lengths_that_it_can_split(
    recipe: str, stage: str, told: bool, minitron: Cli, tmp_path: Path
) -> None:
    layout = f"+execution.parallel_by_stage={{{stage}: {{tp: 2, sequence_parallel: true}}}}"
    overrides = (f"execution.run_root={tmp_path}", layout, f"stages.{stage}.max_seq_len_tokens=129")
    _, output = minitron("check", REPO / f"recipes/toy/{recipe}.yaml", *overrides)
    problem = f"stages.{stage}.max_seq_len_tokens = 129: sequence_parallel needs a multiple of tp = 2."
    assert (problem in " ".join(output.split())) == told, output


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        ("aligned", "sft"),
        ("steerlm", "steerlm_sft"),
        ("steerlm2", "steerlm2"),
        ("offline", "distill_offline"),
    ],
)
def test_sequence_parallelism_must_split_conversations_that_are_padded_to_8_tokens(
    recipe: str, stage: str, minitron: Cli, tmp_path: Path
) -> None:
    layout = f"+execution.parallel_by_stage={{{stage}: {{tp: 16, sequence_parallel: true}}}}"
    _, output = minitron("check", REPO / f"recipes/toy/{recipe}.yaml", f"execution.run_root={tmp_path}", layout)
    problem = f"stages.{stage}: sequence_parallel cannot split sequences over tp = 16"
    assert problem in " ".join(output.split()), output


def test_recipes_with_alignment_are_valid(minitron: Cli, tmp_path: Path) -> None:
    code, told = minitron("check", RECIPE, f"execution.run_root={tmp_path}")
    assert code == 0, told


def test_configs_are_plain() -> None:
    """No tags, no interpolation: what stands there is what NeMo-Aligner gets."""
    for file in (REPO / "configs/align").glob("*.yaml"):
        text = file.read_text()
        assert "${" not in text, file
        yaml.safe_load(text)


def test_what_nemo_lacks_is_refused(tmp_path: Path) -> None:
    from nemo_minitron.backends.alignment.nemo_aligner.model_config import nemo_model_config
    from nemo_minitron.hf.checkpoint import Checkpoint
    from tests.support.tiny_models import tiny_model_dir

    for case, told in (("qwen3", "norms of queries and keys"), ("nemotron", "need Transformer Engine")):
        shape = Checkpoint.open(tiny_model_dir(tmp_path, case)).shape
        with pytest.raises(ConfigError, match=told):
            nemo_model_config(shape, tmp_path, seq_len_tokens=64, on_cpu=True, where=case)
