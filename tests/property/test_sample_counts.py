"""Any numbers of samples are refused before anything runs, or enough samples are drawn for every use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_minitron.config.compose import compose
from nemo_minitron.config.explain import validate
from nemo_minitron.errors import MinitronError
from nemo_minitron.plan.checks import broken_rules
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.stages.score.run import Inputs, _batches
from tests.conftest import TOY
from tests.support.examples import budget
from tests.support.tiny_data import tiny_data_dir

# The tiny data have some 100 samples of 16 tokens: numbers below and above one epoch and zero, and absurd ones.
COUNTS = st.integers(-1, 40) | st.integers(90, 400) | st.sampled_from([0, 10**12, 2**63])
METRICS = st.lists(st.sampled_from(["block_influence", "lm_loss", "logit_mse"]), unique=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data_dir(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return compose(TOY)


@example(num_samples=8, depth_samples=16, micro=4, drops=0, metrics=["block_influence"])
@example(num_samples=16, depth_samples=364, micro=4, drops=0, metrics=["lm_loss"])
@example(num_samples=16, depth_samples=364, micro=4, drops=1, metrics=["block_influence"])
@given(num_samples=COUNTS, depth_samples=COUNTS, micro=st.integers(0, 5), drops=st.integers(0, 2), metrics=METRICS)
@budget(20)
def test_what_is_planned_can_be_drawn(  # type: ignore[no-untyped-def]
    composed,
    data: Path,
    tmp_path: Path,
    num_samples: int,
    depth_samples: int,
    micro: int,
    drops: int,
    metrics: list[str],
) -> None:
    score = {**composed["stages"]["score"], "num_samples": num_samples, "depth_samples": depth_samples}
    score |= {"iterative_drops": drops, "layer_metrics": metrics, "seq_len_tokens": 16}
    execution = {**composed["execution"], "parallel": {"micro_batch_size": micro}, "run_root": str(tmp_path)}
    stages = {**composed["stages"], "score": score}
    try:
        recipe = validate({**composed, "stages": stages, "execution": execution}, where="x")
    except MinitronError:
        assert min(num_samples, depth_samples, micro) < 1
        return
    if any("stages.score" in text for text in broken_rules(make_plan(recipe))):
        return
    params = recipe.stages["score"]
    assert isinstance(params, ScoreStage)
    counts = [params.num_samples, *([params.depth_samples] if params.draws_depth_samples else [])]
    for count, drawn in zip(counts, _drawn(params, data, tmp_path, micro, counts), strict=True):
        assert drawn == list(range(count))


def _drawn(params: ScoreStage, data: Path, work: Path, micro: int, counts: list[int]) -> Iterator[list[int]]:
    """Return the numbers of the samples that the stage draws for each count."""
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.schema.execution import Execution
    from nemo_minitron.system.progress import Progress

    model = Model("teacher", "import", data, "", {})
    inputs = Inputs(model, TokenizedText("data", "tokenize", data, "", {}))
    with open_session(Parallel(micro_batch_size=micro), device="cpu") as session:
        context = StageContext("score", "x", work, work, Execution(), Progress(silent=True), session)
        for count in counts:
            yield [int(i) for batch in _batches(params, inputs, context, count) for i in batch["sample_ids"]]


@example(steps=10**9, batch=10**9)
@given(steps=COUNTS, batch=COUNTS)
@budget(20)
def test_any_numbers_of_a_training_are_planned_or_refused(  # type: ignore[no-untyped-def]
    composed, tmp_path: Path, steps: int, batch: int
) -> None:
    distill = {**composed["stages"]["distill"], "num_steps": steps, "global_batch_size": batch, "warmup_steps": 0}
    stages = {**composed["stages"], "distill": distill}
    try:
        recipe = validate({**composed, "stages": stages}, where="x")
    except MinitronError:
        assert min(steps, batch) < 1
        return
    problems = [text for text in broken_rules(make_plan(recipe)) if "stages.distill" in text]
    assert bool(problems) == (batch % 4 != 0 or steps * batch > 2**32)
