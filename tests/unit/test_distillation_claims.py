"""The claims suite: verdicts from results, tokens to a loss, and results that must not be mixed."""

from __future__ import annotations

import importlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import distillation_claims as part
from nemo_minitron.stages.distill.params import DistillStage
from tests.conftest import REPO

BETTER = part.Claim("", "", "a", ("b",))
EQUAL = part.Claim("", "", "a", ("b",), "equal")
NOT_WORSE = part.Claim("", "", "a", ("b",), "not worse")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module("distillation")


def _found(**losses: list[float]) -> dict[str, Any]:
    return {
        f"{name} #{seed}": {
            "trial": {"name": name, "seed": seed},
            "final": {"valid_loss": loss},
            "curve": [{"tokens": 0, "valid_loss": 9.0}, {"tokens": 100, "valid_loss": loss}],
        }
        for name, values in losses.items()
        for seed, loss in enumerate(values, 1)
    }


@pytest.mark.parametrize(
    ("b", "better", "equal", "not_worse"),
    [
        ([3.10, 3.11, 3.12], part.HELD, part.NOT_HELD, part.HELD),
        ([2.90, 2.91, 2.92], part.NOT_HELD, part.NOT_HELD, part.NOT_HELD),
        ([3.01, 2.99, 3.02], part.UNDECIDED, part.HELD, part.HELD),
        ([3.01, 3.01, 3.10], part.UNDECIDED, part.HELD, part.HELD),
        ([3.00, 3.00, 3.00], part.UNDECIDED, part.HELD, part.HELD),
        ([3.10], "not run", "not run", "not run"),
        ([], "not run", "not run", "not run"),
    ],
    ids=["worse", "better", "seeds disagree", "within the range of the seeds", "the same", "one seed", "none"],
)
def test_verdicts(b: list[float], better: str, equal: str, not_worse: str) -> None:
    found = _found(a=[3.0, 3.0, 3.0], b=b)
    assert [part.verdict(found, claim) for claim in (BETTER, EQUAL, NOT_WORSE)] == [better, equal, not_worse]


def test_seeds_are_compared_one_by_one() -> None:
    # The seeds differ by far more than the two variants do.
    assert part.verdict(_found(a=[3.0, 3.5, 4.0], b=[3.1, 3.61, 4.1]), BETTER) == part.HELD


def test_a_claim_over_several_variants_holds_when_it_holds_over_each() -> None:
    claim = part.Claim("", "", "a", ("b", "c"))
    assert part.verdict(_found(a=[3.0, 3.0], b=[3.1, 3.1], c=[3.2, 3.2]), claim) == part.HELD
    assert part.verdict(_found(a=[3.0, 3.0], b=[3.1, 3.1], c=[3.0, 3.1]), claim) == part.UNDECIDED
    assert part.verdict(_found(a=[3.0, 3.0], b=[3.1, 3.1], c=[2.9, 2.9]), claim) == part.NOT_HELD


def test_tokens_to_a_loss_are_interpolated_between_two_points() -> None:
    curve = [(0, 8.0), (100, 4.0), (300, 3.0)]
    assert part.tokens_to_reach(curve, 6.0) == pytest.approx(50)
    assert part.tokens_to_reach(curve, 3.5) == pytest.approx(200)
    assert part.tokens_to_reach(curve, 8.5) == 0
    assert part.tokens_to_reach(curve, 2.9) is None


def test_the_headline_is_the_ratio_of_tokens() -> None:
    found = _found(**{"from scratch, CE": [4.0, 4.0], "KD": [4.0, 4.0]})
    for name, tokens in (("from scratch, CE", 4000), ("KD", 100)):
        for seed in (1, 2):
            found[f"{name} #{seed}"]["curve"][1]["tokens"] = tokens
    text = part.headline(found)
    assert "reaches it after 4,000: **40.0x** as many" in text
    assert "reaches that after 100: **40x fewer**" in text
    assert "| 4.000 | 100 | 4,000 | **40.0x** |" in text


def test_every_claim_is_about_trials_that_exist_and_every_loss_is_valid(suite: ModuleType) -> None:
    trials = list(suite.trials())
    names = {trial.name for trial in trials}
    assert {name for claim in part.CLAIMS for name in (claim.better, *claim.worse)} <= names
    assert len({trial.id for trial in trials}) == len(trials)
    for trial in trials:
        DistillStage.model_validate(suite._keys(trial, 10, suite.SIZES["cpu"]))


@pytest.mark.parametrize("change", ["model", "text", "loss", "size", "version"])
def test_figures_of_other_models_text_or_keys_are_refused(
    change: str, suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trial, size, file = next(suite.trials()), suite.SIZES["cpu"], tmp_path / "trials.json"
    for stage in (trial.student, trial.teacher, trial.data):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"fingerprint": stage}))
    found = {trial.id: {"made_from": suite.made_from(trial, tmp_path, size)}}
    suite.require_same_origin(found, [trial], tmp_path, size, file)
    if change in ("model", "text"):
        stage = trial.student if change == "model" else trial.data
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"fingerprint": "another"}))
    elif change == "loss":
        trial = replace(trial, loss=suite.CE)
    elif change == "version":
        monkeypatch.setitem(suite.STAGES, "distill", replace(suite.STAGES["distill"], version=100))
    else:
        size = replace(size, steps=size.steps + 1)
    with pytest.raises(SystemExit, match="other models, text or keys"):
        suite.require_same_origin(found, [trial], tmp_path, size, file)


def test_a_failed_trial_keeps_the_others_and_begins_no_more(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began: list[str] = []
    cancelled: list[Any] = []
    all_cancelled, count = threading.Event(), len(list(suite.trials()))

    def train(trial: Any, *_: Any) -> dict[str, Any]:
        began.append(trial.id)
        if len(began) == 2:
            raise ValueError("the loss is not finite")
        if len(began) > 2:
            all_cancelled.wait(10)
        return {"final": {"valid_loss": 3.0}, "wall_s": 1.0}

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: Any) -> Any:
            job = super().submit(*arguments)
            cancel = job.cancel

            def noted() -> bool:
                done = cancel()
                cancelled.append(job)
                if len(cancelled) == count - 2:
                    all_cancelled.set()
                return done

            job.cancel = noted  # type: ignore[method-assign]
            return job

    file = tmp_path / "trials.json"
    monkeypatch.setattr(suite, "train", train)
    monkeypatch.setattr(suite, "require_same_origin", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"The trial .* failed") as caught:
        suite.run_trials(tmp_path, suite.SIZES["smoke"], Pool(1), file, [])
    assert str(caught.value.__cause__) == "the loss is not finite"
    assert began[1] in str(caught.value)
    assert set(json.loads(file.read_text())) == {*began} - {began[1]}
    assert len(began) in (2, 3), "a third one may have begun already"


def test_each_suite_replaces_only_its_own_part_of_the_page(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "results.md"
    claims = importlib.import_module("claims")
    before = f"# Results\n\nby hand\n\n{claims.BEGIN}\n\nold\n\n{claims.END}\n"
    page.write_text(before)
    monkeypatch.setattr(part, "section", lambda *_: "## Distillation\n")
    monkeypatch.setattr(part, "picture", lambda *_: None)
    monkeypatch.setattr(part, "bars", lambda *_: None)
    part.write_page({}, tmp_path, tmp_path, "cpu")
    once = page.read_text()
    assert once.startswith(before + "\n" + part.BEGIN)
    part.write_page({}, tmp_path, tmp_path, "cpu")
    assert page.read_text() == once
    importlib.import_module("pages").replace_part(page, claims.BEGIN, claims.END, "new\n")
    assert page.read_text() == once.replace("old", "new")


def test_a_student_that_stays_above_training_from_scratch_is_not_called_faster_than_it_is() -> None:
    found = _found(**{"from scratch, CE": [3.0, 3.0], "KD": [6.0, 6.0]})
    text = part.headline(found)
    assert "reaches it after 50: **0.5x** as many" in text
    assert "does not get that low" in text
