"""Composition, validation and planning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.config.compose import recipe_name
from nemo_minitron.errors import ConfigError, PlanError
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.plan.fingerprint import _NEWER_KEYS, canonical_json, differences, fingerprint, params_of
from nemo_minitron.plan.sources import changed_sources, source_facts
from tests.conftest import REPO, TOY

CACHED = REPO / "recipes/toy/cached.yaml"


def test_any_key_of_the_schema_can_be_overridden_without_a_plus() -> None:
    recipe = load_recipe(TOY, ["stages.distill.adam_beta1=0.5", "execution.parallel.tp=2"])
    assert recipe.stages["distill"].adam_beta1 == 0.5  # type: ignore[union-attr]
    assert recipe.execution.parallel.tp == 2


def test_a_config_group_can_be_chosen_on_the_command_line() -> None:
    recipe = load_recipe(TOY, ["model@stages.teacher=smollm2_135m"])
    assert recipe.stages["teacher"].source == "asset:smollm2-135m-instruct"  # type: ignore[union-attr]


def test_the_name_is_the_path_below_recipes() -> None:
    assert recipe_name(Path("/x/recipes/a/b.yaml")) == "a/b"
    assert recipe_name(Path("/x/mine.yaml")) == "mine"
    assert load_recipe(TOY, []).name == "toy/width"


def test_a_recipe_outside_the_repository_finds_the_configs_of_the_package(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults:\n  - /model@stages.teacher: toy_llama\n  - _self_\n")
    assert list(load_recipe(recipe, []).stages) == ["teacher"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.distil.lr=1", "Did you mean stages.distill?"),
        ("stages.distill.kind=trains", "stages.distill.kind = 'trains': not a kind of stage. Allowed: adopt"),
        ("stages.select.method=best", "'importance', 'random' or 'magnitude'"),
        ("stages.distill.loss.logits.temperatur=2", "Did you mean temperature?"),
        ("eval=nothing", "could not be composed"),
        ("stages.distill.lr=[", "not a list or mapping"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(TOY, [override])


def test_the_error_about_a_missing_recipe_names_its_neighbors() -> None:
    with pytest.raises(ConfigError, match=r"toy/depth\.yaml"):
        load_recipe(REPO / "recipes/toy/widht.yaml", [])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.prune.inputs.plan=nowhere", "there is no such stage"),
        ("stages.prune.inputs.plan=score", "Allowed kinds for plan: select"),
        ("stages.distill.inputs.teacher=distill", "form a cycle"),
        ("stages.distill.global_batch_size=6", "must be a multiple of dp \\* micro_batch_size"),
        ("stages.distill.min_lr=1", "above lr"),
        ("stages.distill.warmup_steps=30", "must be below num_steps"),
        ("stages.distill.seq_len_tokens=4096", "supports at most 256"),
        ("stages.evaluate_pruned.label=teacher", "has the same label"),
        ("execution.parallel.cp=2", "cp = 2: stages.score needs whole sequences"),
        (
            "++execution.parallel_by_stage.distill.cp=2 stages.distill.seq_len_tokens=126",
            "stages.distill.seq_len_tokens = 126: .*cp = 2 needs a multiple of 4",
        ),
        ("stages.score.width_axes=[hidden]", "axis ffn is not scored"),
        ("stages.select.target.num_layers=3 stages.select.layer_metric=lm_loss", "not measured"),
        (
            "stages.distill.teacher_correction={pretraining_lr:1e-3}",
            r"distill\.teacher_correction\.warmup_steps = 120: must be below num_steps = 30",
        ),
        (
            "stages.distill.teacher_correction={pretraining_lr:1e-3,warmup_steps:5,min_lr:3e-4}",
            r"distill\.teacher_correction\.min_lr = 0\.0003: above lr = 0\.0002",
        ),
        (
            "stages.distill.teacher_correction={pretraining_lr:1e-3,warmup_steps:5} "
            "stages.distill.loss={logits:null,next_token:1}",
            "the loss does not use the teacher",
        ),
        ("stages.distill.loss.anchors={}", r"distill\.loss\.anchors: needs stages\.distill\.inputs\.plan"),
        ("stages.distill.inputs.plan=select", r"only loss\.anchors reads it"),
        (
            "stages.distill.loss.anchors={} stages.distill.inputs.plan=select_random "
            "stages.select_random.target={hidden_size:48}",
            r"distill\.inputs\.plan = select_random: it leaves .*'hidden_size': 48.* but prune has .*'hidden_size': 56",
        ),
        (
            "stages.distill.loss.anchors={decay_steps:31} stages.distill.inputs.plan=select",
            r"decay_steps = 31: above num_steps = 30",
        ),
        (
            "stages.distill.loss.anchors={} stages.distill.inputs.plan=select execution.parallel.recompute=full",
            r"recompute = full: not supported with stages\.distill\.loss\.anchors",
        ),
        (
            "stages.distill.loss.anchors={} stages.distill.inputs.plan=select "
            "stages.distill.teacher_correction={pretraining_lr:1e-3,warmup_steps:5}",
            r"loss\.anchors: not supported with teacher_correction",
        ),
        (
            "++stages.layers={kind:distill_layers,num_steps:9,global_batch_size:8,seq_len_tokens:128,lr:1e-3} "
            "execution.parallel.recompute=full",
            r"recompute = full: not supported by stages\.layers",
        ),
        (
            "++stages.layers={kind:distill_layers,num_steps:9,global_batch_size:8,seq_len_tokens:128,lr:1e-3,"
            "inputs:{student:teacher}}",
            r"layers\.inputs\.plan = select: it leaves .* but teacher has",
        ),
        (
            "++stages.layers={kind:distill_layers,num_steps:9,global_batch_size:8,seq_len_tokens:128,lr:1e-3,"
            "inputs:{teacher:prune}}",
            r"layers\.inputs\.plan = select: it was made for .* but prune has",
        ),
        (
            "stages.distill.loss.anchors={} stages.distill.inputs.plan=select_random",
            r"distill\.inputs\.plan = select_random: prune was pruned by select\. Next: name select",
        ),
        (
            "++stages.layers={kind:distill_layers,num_steps:9,global_batch_size:8,seq_len_tokens:128,lr:1e-3,"
            "inputs:{student:distill,plan:select_random}}",
            r"layers\.inputs\.plan = select_random: distill was pruned by select\.",
        ),
        (
            "++stages.repair={kind:compensate,num_samples:64,seq_len_tokens:128,inputs:{student:prune_random}}",
            r"repair\.inputs\.plan = select: prune_random was pruned by select_random\.",
        ),
        (
            "stages.distill.loss.hidden={pairs:[[0,0],[-5,4]]}",
            r"loss\.hidden\.pairs\.1: the teacher has no layer -5\. Allowed: -4 to 3",
        ),
        ("stages.distill.loss.hidden={pairs:[[0,4]]}", r"pairs\.0: the student has no layer 4\. Allowed: -4 to 3"),
        ("stages.distill.loss.hidden={pairs:[],embedding:false}", r"loss\.hidden: compares nothing"),
        ("stages.distill.num_steps=1 stages.distill.warmup_steps=0", r"distill\.lr = .*never used.*min_lr = "),
    ],
)
def test_a_recipe_that_cannot_run_is_rejected(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        load_plan(TOY, [f"execution.run_root={tmp_path}", *override.split()])


def test_a_student_belongs_to_its_own_plan_whatever_it_is_called_and_whichever_model_teaches(tmp_path: Path) -> None:
    """A plan of the same keys keeps the same indices, and a corrected teacher has the same sizes."""
    correct = "{kind:train,num_steps:9,global_batch_size:8,seq_len_tokens:128,lr:1e-3}"
    repair = "{kind:compensate,num_samples:64,seq_len_tokens:128,inputs:{teacher:correct,student:distill,plan:same}}"
    options = (
        f"++stages.correct={correct}",
        "++stages.same={kind:select,target:${stages.select.target}}",
        f"++stages.repair={repair}",
    )
    plan = load_plan(TOY, [f"execution.run_root={tmp_path}", *options])
    assert plan.call("repair").inputs["plan"] == "same"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.cache_teacher.num_samples=239", r"num_samples = 239: stages.distill reads .* = 240 samples"),
        ("stages.distill.seq_len_tokens=64", "stages.cache_teacher has 128; both must be the same"),
        ("execution.parallel.cp=2", "cp = 2: stages.cache_teacher needs whole sequences"),
        ("stages.distill.seed=7", "stages.cache_teacher has 1234; both must be the same"),
        ("stages.distill.reset_attention_mask=true", "stages.cache_teacher has False; both must be the same"),
        (
            "stages.cache_teacher.inputs.teacher=prune",
            "inputs.teacher = teacher: stages.cache_teacher uses prune",
        ),
        ("stages.distill.loss.hidden={}", "the cache has no hidden states"),
        ("stages.distill.loss.anchors={}", "the cache has no outputs of layers"),
        ("stages.distill.loss={logits: null, next_token: 1}", "the loss does not use logits"),
        (
            "stages.distill.loss.logits.sparse.rounds=49",
            "temperature must be the same as in stages.cache_teacher",
        ),
        (
            "stages.distill.loss.logits.temperature=2",
            "temperature must be the same as in stages.cache_teacher",
        ),
        (
            "stages.distill.loss.logits.sparse=null",
            "temperature must be the same as in stages.cache_teacher",
        ),
        ("stages.distill.inputs.cache=score", "Allowed kinds for cache: cache_teacher"),
        (
            "stages.distill.teacher_correction={pretraining_lr: 1e-3, warmup_steps: 5}",
            "teacher_correction: a cached teacher cannot be trained",
        ),
    ],
)
def test_a_distillation_that_needs_more_than_its_cache_has_is_rejected(
    override: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=words):
        load_plan(CACHED, [f"execution.run_root={tmp_path}", override])


def test_a_stage_changes_if_its_text_is_edited_but_not_if_it_is_removed(tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "one"}')
    recipe = load_recipe(TOY, [f"stages.data.sources=[{{source: '{text}'}}]", f"execution.run_root={tmp_path}"])
    stage = recipe.stages["data"]
    before = source_facts(stage, recipe, {})
    assert before == {str(text): {"files": 1, "bytes": 15}}
    text.write_text('{"text": "one, and more"}')
    assert source_facts(stage, recipe, before) != before
    text.unlink()
    assert source_facts(stage, recipe, before) == before


UNRELATED = ("README.md", "original/consolidated.00.pth", ".git/HEAD", ".cache/huggingface/x.lock", "figures/a.png")


def test_only_files_that_are_read_of_a_model_change_its_stage(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILT_IN["toy-llama"], folder)
    recipe = load_recipe(TOY, [f"stages.teacher.source={folder}", f"execution.run_root={tmp_path}"])
    stage = recipe.stages["teacher"]
    before = source_facts(stage, recipe, {})
    for name in UNRELATED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1234")
    assert source_facts(stage, recipe, {}) == before
    # Older versions counted every file.
    facts = before[str(folder)]
    older = {str(folder): {"files": facts["files"] + 5, "bytes": facts["bytes"] + 20}}
    assert source_facts(stage, recipe, older) == older
    assert changed_sources(stage, recipe, older) == changed_sources(stage, recipe, before) == {}
    for name in ("vocab.json", "model-00009.safetensors", "additional_chat_templates/tool.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}  ")
        facts = {"files": facts["files"] + 1, "bytes": facts["bytes"] + 4}
        assert source_facts(stage, recipe, before) == source_facts(stage, recipe, older) == {str(folder): facts}
        assert changed_sources(stage, recipe, before) == {str(folder): facts}
    shutil.rmtree(folder)
    assert source_facts(stage, recipe, before) == before
    assert changed_sources(stage, recipe, before) == {str(folder): None}


def test_differences_name_the_field() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 2, "c": [1]}, "d": 0, "e": None}
    assert differences(old, new) == ["a.b: 1 -> 2"]
    assert differences(old, old) == []


def test_fingerprints_depend_on_content_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    for unstable in (float("nan"), object()):
        with pytest.raises(TypeError):
            canonical_json({"a": unstable})


def test_a_newer_key_inside_a_section_counts_only_if_it_differs_from_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished runs of older versions do not have a new key, which `jsd_beta` stands for here."""
    key = "loss.logits.jsd_beta"
    monkeypatch.setitem(_NEWER_KEYS, key, 0.5)
    search = REPO / "recipes/toy/search.yaml"

    def losses(*loss: str) -> list[dict[str, Any]]:
        stages = load_recipe(search, [f"stages.{place}.loss={text}" for text in loss for place in places]).stages
        return [params_of(stages["distill"])["loss"], params_of(stages["search"])["retraining"]["loss"]]

    places = ("distill", "search.retraining")
    assert not any("jsd_beta" in loss["logits"] for loss in losses())
    assert all("temperature" in loss["logits"] for loss in losses())
    other = losses("{logits: {kind: jsd, jsd_beta: 0.1}}")
    assert [loss["logits"]["jsd_beta"] for loss in other] == [0.1, 0.1]
    assert [loss["logits"] for loss in losses("{logits: null, next_token: 1.0}")] == [None, None]


def test_a_student_with_a_smaller_vocabulary_than_its_cached_teacher_is_rejected(tmp_path: Path) -> None:
    """The teacher of the toy recipe has 512 tokens."""
    sizes = "num_hidden_layers:2,hidden_size:64,intermediate_size:64,num_attention_heads:4,vocab_size:511"
    small = f"++stages.small={{kind:import,source:x,architecture:{{architectures:[LlamaForCausalLM],{sizes}}}}}"
    with pytest.raises(PlanError, match=r"distill\.inputs\.cache = cache_teacher: .* the student one of 511"):
        load_plan(CACHED, [f"execution.run_root={tmp_path}", small, "stages.distill.inputs.student=small"])
