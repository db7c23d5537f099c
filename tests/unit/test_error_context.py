"""Errors of the layers below recipes, with what the stages add: their names, keys and inputs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nemo_minitron.errors import ArtifactError, DataError, MinitronError, NumericsError, PlanError, error_context
from nemo_minitron.pruning.plan_file import PLAN_FILE, SCHEMA
from nemo_minitron.pruning.search import SEARCH_FILE
from nemo_minitron.schema.pruning import Selection
from nemo_minitron.stages.artifacts import Model, PrunePlanArtifact, Scores, SearchResult, TeacherCache, TokenizedText
from nemo_minitron.stages.common.scores import choose_plan
from nemo_minitron.stages.distill import run as distilling
from nemo_minitron.stages.search.expansion import points_of
from nemo_minitron.stages.search.params import SearchStage
from tests.conftest import REPO

MODEL = Model("teacher", "import", REPO / "nemo_minitron/toy/model", "", {})
REDO = "To make it again: --rerun {}."


def test_a_context_adds_what_an_error_lacks() -> None:
    with pytest.raises(PlanError) as found, error_context(PlanError, where="stages.x", next_step="Then y."):
        raise PlanError("wrong", next_step="Do x.")
    assert str(found.value) == "wrong\n  where: stages.x\n  next: Do x. Then y."
    with pytest.raises(PlanError) as found, error_context(PlanError, where="stages.x"):
        raise PlanError("wrong", where="file")
    assert str(found.value) == "wrong\n  where: file"


def test_a_context_does_not_change_errors_of_other_types() -> None:
    with pytest.raises(DataError) as found, error_context(PlanError, where="stages.x"):
        raise DataError("wrong")
    assert str(found.value) == "wrong"


def _scores(folder: Path, **tensors: torch.Tensor) -> Scores:
    Scores.save(tensors, folder)
    return Scores("importance", "score", folder, "", {})


def _chosen(scores: Scores, **target: int) -> MinitronError:
    with pytest.raises(MinitronError) as found:
        choose_plan(Selection.model_validate({"target": target}), MODEL, scores, "stages.select")
    return found.value


def test_errors_about_scores_name_the_stage_that_made_them(tmp_path: Path) -> None:
    size = MODEL.shape.ffn_hidden_size
    missing = _chosen(_scores(tmp_path, hidden=torch.ones(3)), ffn_hidden_size=size // 2)
    assert isinstance(missing, ArtifactError)
    assert missing.next_step is not None
    assert missing.next_step.startswith("Add it to width_axes")
    assert missing.next_step.endswith(REDO.format("importance"))
    scores = torch.full((MODEL.shape.num_layers, size), torch.nan)
    not_finite = _chosen(_scores(tmp_path, ffn=scores), ffn_hidden_size=size // 2)
    assert isinstance(not_finite, NumericsError)
    assert not_finite.next_step == f"Score with precision: fp32. {REDO.format('importance')}"


def test_an_impossible_target_names_the_stage_that_selects(tmp_path: Path) -> None:
    too_large = _chosen(_scores(tmp_path, hidden=torch.ones(3)), ffn_hidden_size=MODEL.shape.ffn_hidden_size + 1)
    assert isinstance(too_large, PlanError)
    assert too_large.where == "stages.select"


def test_a_damaged_plan_or_search_names_its_stage(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text("{")
    with pytest.raises(ArtifactError) as found:
        PrunePlanArtifact("cut", "select", tmp_path, "", {}).load(MODEL.shape)
    assert found.value.next_step == REDO.format("cut")
    document = {"schema": SCHEMA, "source": {"hidden_size": 1}, "target": {}, "keep": {}, "method": "importance"}
    (tmp_path / PLAN_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="was made for") as found:
        PrunePlanArtifact("cut", "select", tmp_path, "", {}).load(MODEL.shape)
    assert found.value.next_step == REDO.format("cut")
    (tmp_path / SEARCH_FILE).write_text("{")
    with pytest.raises(ArtifactError) as found:
        SearchResult("sizes", "search", tmp_path, "", {}).winner()
    assert found.value.next_step == REDO.format("sizes")


def test_a_search_without_candidates_is_located() -> None:
    stage = SearchStage.model_construct(
        grid={"ffn_hidden_size": (8,)},
        constraints=SearchStage.model_fields["constraints"].default.model_copy(update={"num_params": 1}),
    )
    with pytest.raises(PlanError, match="meets the constraints") as found:
        points_of("sizes", stage, MODEL.shape)
    assert found.value.where == "stages.sizes"


def test_an_error_about_a_cache_names_the_stage_that_made_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def damaged(*_: Any, cache: Path) -> None:
        raise ArtifactError("The teacher cache is damaged: x.", where=str(cache))

    monkeypatch.setattr(distilling, "distill_student", damaged)
    monkeypatch.setattr(distilling, "require_one_tokenizer", lambda *_: None)
    inputs = distilling.Inputs(
        MODEL,
        MODEL,
        TokenizedText("data", "tokenize", tmp_path, "", {}),
        cache=TeacherCache("logits", "cache_teacher", tmp_path, "", {}),
    )
    with pytest.raises(ArtifactError) as found:
        distilling.distill(cast(Any, None), inputs, cast(Any, SimpleNamespace()))
    assert (found.value.where, found.value.next_step) == (str(tmp_path), REDO.format("logits"))
