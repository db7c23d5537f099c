"""`minitron rlhf`: configs and scripts word for word, what is refused, and the whole command without a container.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/golden."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_minitron.artifacts.manifest import MANIFEST_FILE
from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.rlhf import PROGRAMS, render
from nemo_minitron.backends.alignment.nemo_aligner.rlhf_checks import Limits, RlhfFacts, rlhf_problems
from nemo_minitron.backends.alignment.nemo_aligner.unpack import CONFIG_FILE
from nemo_minitron.cli.main import INTERRUPTED
from nemo_minitron.cli.rlhf import parse_settings
from nemo_minitron.errors import ConfigError
from nemo_minitron.families import read_shape
from tests.conftest import Cli
from tests.support.tiny_models import tiny_model_dir

GOLDEN = Path(__file__).parent / "rlhf"
WIDTH_4B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
RUN = Path("/shared/runs/llama31_8b/width_4b_instruct")
FACTS = RlhfFacts(
    actor_model=RUN / "export",
    actor_shape=read_shape(WIDTH_4B, where="test"),
    stop="<|eot_id|>",
    reward="regression",
    reward_nemo=RUN / "attribute_model/nemo",
    reward_tokenizer=RUN / "attribute_model/nemo.tokenizer",
    reward_limits=Limits(32, 8, 131072),
    num_prompts=20000,
    num_valid_prompts=200,
)
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "ppo": ("ppo", ["actor_layout.tp=2", "actor.model.optim.weight_decay=0.01"], {}),
    "reinforce": ("reinforce", ["trt_llm=true", "server_host=node7"], {"reward": "ranking"}),
    "several_nodes": (
        "ppo",
        [
            "actor_layout={num_nodes: 4, tp: 4, pp: 2}",
            "server_layout.num_nodes=2",
            "num_valid_prompts=128",
            "server_host=node9",
        ],
        {},
    ),
}


def _rendered(name: str, out: Path) -> dict[str, str]:
    algorithm, texts, changed = CASES[name]
    settings, facts = parse_settings(algorithm, texts), replace(FACTS, **changed)
    assert not list(rlhf_problems(settings, facts))
    return render(settings, facts, out)


@pytest.mark.parametrize("name", CASES)
def test_files_are_as_before(name: str) -> None:
    folder = GOLDEN / name
    files = _rendered(name, RUN / f"rlhf_{name}")
    for file, text in files.items():
        if os.environ.get("UPDATE_GOLDEN"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        assert (folder / file).read_text() == text, file
    assert {path.name for path in folder.iterdir()} == files.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_two_programs_agree(name: str) -> None:
    programs = PROGRAMS[CASES[name][0]]
    files = _rendered(name, Path("/out"))
    actor, server = (yaml.safe_load(files[f"{method}.yaml"]) for method in (programs.actor, programs.server))
    assert "???" not in "".join(files.values())
    assert actor["trainer"][programs.section]["trt_llm"] == actor["model"][programs.section]["trt_llm"]
    assert actor["model"]["precision"] == actor["trainer"]["precision"] == "bf16"
    if programs.section == "ppo":
        asked, port = actor["remote_critic_rm"]["critic"], server["trainer"]["ppo"]["port"]
        for flags in (actor["remote_critic_rm"], server["trainer"]["ppo"]):
            assert flags["combine_rm_and_critic_server"] is True
        assert actor["remote_critic_rm"]["pad_to_length"] == server["model"]["encoder_seq_length"]
    else:
        asked, port = actor["remote_rm"]["reward_model"], server["inference"]["port"]
        assert asked["name"] == server["inference"]["model_name"]
        assert actor["remote_rm"]["pad_to_length"] == server["model"]["encoder_seq_length"]
    assert asked["port"] == port


def test_one_key_for_two_places() -> None:
    """The trainer reads these below `trainer`, the model below `model`."""
    changes = ["actor.trainer.ppo.trt_llm.unload_engine_train=true", "actor.trainer.precision=bf16-mixed"]
    files = render(parse_settings("ppo", changes), FACTS, Path("/out"))
    model = yaml.safe_load(files["ppo_actor.yaml"])["model"]
    assert model["ppo"]["trt_llm"]["unload_engine_train"] is True
    assert model["precision"] == "bf16-mixed"


def test_scripts_are_bash_and_no_path_is_read_as_code(tmp_path: Path) -> None:
    out = tmp_path / "a b; $(touch hit) 'c"
    for name in CASES:
        for file, text in _rendered(name, out).items():
            if not file.endswith(".sh"):
                yaml.safe_load(text)
                continue
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
            used = [line for line in text.splitlines() if "touch hit" in line]
            assert used
            assert all(any(str(out) in word for word in shlex.split(line)) for line in used)


@pytest.mark.parametrize(
    ("algorithm", "texts", "told"),
    [
        ("ppo", ["global_batch_size=60"], "global_batch_size = 60: not a multiple of micro_batch_size * dp"),
        ("ppo", ["global_batch_size=96", "num_rollout_prompts=512"], "512: not a multiple of global_batch_size = 96"),
        ("reinforce", ["rollouts_per_prompt=3", "global_batch_size=1024"], "1536: not a multiple of global_batch_size"),
        ("ppo", ["rollout_micro_batch_size=24"], "num_rollout_prompts = 512: not a multiple of rollout_micro"),
        ("ppo", ["num_valid_prompts=60"], "num_valid_prompts = 60: not a multiple of rollout_micro_batch_size"),
        ("ppo", ["actor_layout.tp=3"], "tp * pp = 3 * 1 does not divide the GPUs"),
        ("ppo", ["server_layout.gpus_per_node=6"], "dp of the server = 1 * 6"),
        ("ppo", ["actor_layout.pp=3", "actor_layout.gpus_per_node=6"], "the same number of layers in every"),
        ("ppo", ["actor_layout.tp=16", "actor_layout.num_nodes=2"], "must divide the 8 query groups"),
        ("ppo", ["actor_layout.num_nodes=2"], "the host name of the server's first node"),
        ("ppo", ["max_new_tokens=4096"], "leaves no tokens for a prompt"),
        ("ppo", ["max_seq_len_tokens=262144"], "the model has 131072 positions"),
        ("ppo", ["num_rollout_prompts=20480"], "there are 20000 different prompts of up to 2048"),
        ("ppo", ["lr=1e-8"], "min_lr = 9e-08: above lr = 1e-08"),
        ("ppo", ["warmup_steps=100000"], "warmup_steps = 100000: must be fewer than the optimizer steps"),
        ("ppo", ["attribute_weights={helpfulness: 0}"], "reward would be 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(algorithm: str, texts: list[str], told: str) -> None:
    problems = list(rlhf_problems(parse_settings(algorithm, texts), FACTS))
    assert any(told in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("algorithm", "text", "told"),
    [
        ("ppo", "learning_rate=1", "learning_rate"),
        ("ppo", "kl_penalti=1", "Did you mean kl_penalty?"),
        ("ppo", "server_port=99999", "less than or equal to 65535"),
        ("ppo", "server_host=a;b", "server_host"),
        ("grpo", "lr=1e-6", "'ppo' or 'reinforce'"),
        ("ppo", "lr", "does not have the form KEY=VALUE"),
        ("ppo", "actor.model.ppo.combine_rm_and_critic_server=true", "Use remote_critic_rm.combine_rm_and_critic"),
        ("ppo", "actor.trainer.ppo.trt_model_dir=/x", "Use model.ppo.trt_model_dir"),
        ("ppo", "actor.model.ppo.ratio_ep=0.1", "Did you mean model.ppo.ratio_eps?"),
        ("ppo", "actor.model.ppo.ratio_eps=2", "outside of [0.0, 1.0]"),
        ("ppo", "actor.trainer.devices=4", "set by minitron rlhf from its own keys"),
        ("ppo", "server.model.loss_clip_vall=0.1", "Did you mean model.loss_clip_val?"),
        ("reinforce", "server.inference.micro_batch_size=4", "Use inference.inference_micro_batch_size"),
        ("reinforce", "actor.trainer.reinforce.gae_lambda=0.9", "unknown to NeMo-Aligner's reinforce_actor"),
    ],
)
def test_a_wrong_key_is_refused(algorithm: str, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        render(parse_settings(algorithm, [text]), FACTS, Path("/out"))
    assert told in str(error.value)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run's folder: a model, a reward model and chats, as far as the command looks at them."""
    run = tmp_path / "run"
    model = tiny_model_dir(run, "llama_gqa_tied")
    model.rename(run / "export")
    reward = run / "attribute_model"
    (reward / "nemo").mkdir(parents=True)
    sizes = {"num_layers": 4, "num_query_groups": 4, "max_position_embeddings": 256}
    (reward / "nemo/model_config.yaml").write_text(yaml.safe_dump(sizes))
    tiny_model_dir(reward, "llama_gqa_tied").rename(reward / "nemo.tokenizer")
    _manifest(reward, "train_attribute_model", {"reward": "ranking", "template": "model", "whole_markers": True})
    for stage, rows in (("chats", "conversations"), ("preferences", "pairs")):
        (run / stage).mkdir()
        _manifest(run / stage, "chat_data", {"rows": rows})
    for part, numbers in (("train", range(40)), ("valid", range(39, 56))):  # 39 is in both
        said = [_chat(f"What is {number}?") for number in numbers]
        (run / f"chats/{part}.jsonl").write_text("\n".join(map(json.dumps, [*said, _chat("why " * 200)])) + "\n")
    return run


def _chat(asked: str) -> dict[str, Any]:
    words = [("user", asked), ("assistant", "It is a number.")]
    return {"messages": [{"role": role, "content": text} for role, text in words], "origin": "test:1"}


def _manifest(folder: Path, kind: str, result: dict[str, Any]) -> None:
    facts = {"recipe": "r", "stage": folder.name, "kind": kind, "fingerprint": "f", "payload": {}, "inputs": {}}
    (folder / MANIFEST_FILE).write_text(json.dumps({**facts, "result": result}))


SMALL = (
    "max_seq_len_tokens=128",
    "max_new_tokens=32",
    "num_rollout_prompts=32",
    "global_batch_size=16",
    "rollout_micro_batch_size=2",
    "num_valid_prompts=16",
)


def test_from_a_run_to_files(finished: Path, minitron: Cli) -> None:
    code, told = minitron("rlhf", finished, "--algorithm", "reinforce", "--dry-run", *SMALL)
    assert code == 0, told
    out = finished / "rlhf_reinforce"
    assert f"minitron convert {finished}/export {out}/actor_start" in told
    prompts = [json.loads(line)["text"] for line in (out / "prompts/train.jsonl").read_text().splitlines()]
    assert len(prompts) == 32  # of 40, those that fill a step; the long one would be replaced without a word
    assert prompts[0].startswith("<|im_start|>user\nWhat is 0?")
    assert len((out / "prompts/valid.jsonl").read_text().splitlines()) == 16  # without the training prompt
    config = yaml.safe_load((out / "reinforce_actor.yaml").read_text())
    assert config["model"]["data"]["data_prefix"]["train"] == [str(out / "prompts/train.jsonl")]
    assert config["trainer"]["reinforce"]["max_epochs"] == 100
    code, told = minitron("rlhf", finished, "--algorithm", "reinforce", "--dry-run", *SMALL)
    assert code == 2
    assert "already exists" in told


def _built_whole(_: Path, built: Path, *_more: object, **_keys: object) -> None:
    built.mkdir()
    (built / CONFIG_FILE).write_text("tokenizer: {type: unknown}")
    (built.parent / "nemo.tokenizer").mkdir()


def test_an_interrupted_call_leaves_nothing_and_can_be_repeated(
    finished: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path, built: Path, *_more: object, **_keys: object) -> None:
        built.mkdir()
        raise KeyboardInterrupt

    before = sorted(finished.iterdir())
    monkeypatch.setattr(convert, "to_nemo", interrupted)
    assert minitron("rlhf", finished, *SMALL)[0] == INTERRUPTED
    assert sorted(finished.iterdir()) == before
    monkeypatch.setattr(convert, "to_nemo", _built_whole)
    code, told = minitron("rlhf", finished, *SMALL)
    assert code == 0, told
    model = finished / "rlhf_ppo/actor_start"
    config = yaml.safe_load((model / CONFIG_FILE).read_text())
    assert config["tokenizer"]["type"] == str(model / "tokenizer")
    assert (model / "tokenizer").is_dir()
    assert sorted(path.name for path in finished.iterdir()) == sorted([*(path.name for path in before), "rlhf_ppo"])
    assert sorted(path.name for path in model.parent.iterdir() if path.name.startswith(".")) == []


def test_an_interrupted_conversion_leaves_no_archive_and_can_be_repeated(
    finished: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **_keys: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "to_nemo", _built_whole)
    out = finished / "model.nemo"
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copytree", interrupted)
        assert minitron("convert", finished / "export", out)[0] == INTERRUPTED
    assert not out.exists()
    (out.with_suffix("") / "tokenizer").mkdir(parents=True)  # an interrupt just after that
    code, told = minitron("convert", finished / "export", out)
    assert code == 0, told
    assert out.is_file()
    assert list(finished.glob(".convert-*")) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tokenizer", "has another tokenizer than the model"),
        ("template", "was trained with another chat template"),
        ("two", "Name one with --reward"),
        ("none", "The run has no finished stage of kind train_attribute_model"),
    ],
)
def test_a_reward_model_that_would_misread_is_refused(change: str, told: str, finished: Path, minitron: Cli) -> None:
    reward = finished / "attribute_model"
    if change == "tokenizer":
        file = reward / "nemo.tokenizer/tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"]["more"] = len(content["model"]["vocab"])
        file.write_text(json.dumps(content))
    elif change == "template":
        file = reward / MANIFEST_FILE
        content = json.loads(file.read_text())
        content["result"] |= {"template": "chatml", "whole_markers": False}
        file.write_text(json.dumps(content))
    elif change == "two":
        (finished / "other").mkdir()
        (finished / "other" / MANIFEST_FILE).write_bytes((reward / MANIFEST_FILE).read_bytes())
    else:
        (reward / MANIFEST_FILE).unlink()
    code, found = minitron("rlhf", finished, "--dry-run", *SMALL)
    assert code == 2, found
    assert told in " ".join(found.split())
    assert not (finished / "rlhf_ppo").exists()
