"""Inputs of PPO and REINFORCE from a finished run: a model, a reward model and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.artifacts.manifest import Manifest, read_manifest
from nemo_minitron.backends.alignment.nemo_aligner.model_config import REWARD_DIR, tokenizer_dir
from nemo_minitron.backends.alignment.nemo_aligner.rlhf_checks import Limits, RlhfFacts, longest_prompt_tokens
from nemo_minitron.backends.alignment.nemo_aligner.unpack import CONFIG_FILE
from nemo_minitron.data.chat.prompts import read_prompts
from nemo_minitron.data.chat.reward_texts import misreadings
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import ArtifactError
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.schema.rlhf import Rlhf

PARTS = ("train", "valid")


def find_stage(run: Path, kinds: tuple[str, ...], named: str | None, option: str) -> Path:
    """Return the folder of the only finished stage of these kinds, or of the one that the user names.

    Args:
        named: name of the stage; None: there must be exactly one.
        option: command-line option that names a stage, for the error message.

    Raises:
        ArtifactError: there is no such stage, or there are several and none is named.
    """
    finished = {path.name: read_manifest(path) for path in sorted(run.iterdir()) if path.is_dir()}
    found = [name for name, manifest in finished.items() if manifest is not None and _fits(manifest, kinds)]
    chosen = [name for name in found if named in (None, name)]
    if len(chosen) == 1:
        return run / chosen[0]
    what = f"stage of kind {' or '.join(kinds)}"
    if not found:
        raise ArtifactError(
            f"The run has no finished {what}.",
            where=str(run),
            next_step="minitron status RECIPE shows what has finished; prompts come from conversations, not pairs.",
        )
    raise ArtifactError(
        f"Several stages match: {', '.join(found)}." if named is None else f"{named} is no finished {what}.",
        where=str(run),
        allowed=", ".join(found),
        next_step=f"Name one with {option}.",
    )


def _fits(manifest: Manifest, kinds: tuple[str, ...]) -> bool:
    return manifest.kind in kinds and manifest.result.get("rows") != "pairs"


def prompts_by_part(settings: Rlhf, rows: Path, template: ChatTemplate) -> dict[str, list[str]]:
    """Return part -> prompts: the text before the last answer of every conversation, each prompt once.

    Long and unusable ones are left out, as are training prompts that do not fill a step.

    Raises:
        DataError: the template cannot render too many rows.
    """
    seen: set[str] = set()
    texts: dict[str, list[str]] = {}
    for part in PARTS:
        file = rows / f"{part}.jsonl"
        found = read_prompts(file, template, longest_tokens=longest_prompt_tokens(settings), seen=seen)
        found.bad.require_few(settings.max_bad_fraction, str(file), "max_bad_fraction")
        if part == "train":
            found.keep_whole_steps(settings.num_rollout_prompts)
        texts[part] = [prompt.text for prompt in found.prompts]
    return texts


def gather_facts(model: Path, template: ChatTemplate, reward: Path, prompts: dict[str, list[str]]) -> RlhfFacts:
    """Collect the facts that the settings are checked against.

    Args:
        reward: folder of a finished train_attribute_model stage.

    Raises:
        CheckpointError: the model is damaged.
    """
    manifest = read_manifest(reward)
    assert manifest is not None
    nemo = reward / REWARD_DIR
    config: dict[str, Any] = yaml.safe_load((nemo / CONFIG_FILE).read_text(encoding="utf-8"))
    tokenizer = tokenizer_dir(nemo)
    return RlhfFacts(
        actor_model=model,
        actor_shape=Checkpoint.open(model).shape,
        stop=template.end_of_turn(),
        reward=manifest.result["reward"],
        reward_nemo=nemo,
        reward_tokenizer=tokenizer,
        reward_limits=Limits(config["num_layers"], config["num_query_groups"], config["max_position_embeddings"]),
        num_prompts=len(prompts["train"]),
        num_valid_prompts=len(prompts["valid"]),
        misunderstandings=tuple(misreadings(model, template, tokenizer, manifest.stage, manifest.result)),
    )
