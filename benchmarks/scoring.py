"""What scoring costs: activation_scores against a plain forward pass over the same batches, in time and memory.

Time: both in one process, in turns. Memory: the peak of a process that does the one or the other.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

from measuring import interleaved, memory_gib

from nemo_minitron import api
from nemo_minitron.backends.megatron.data.datasets import step_batches, training_samples
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.scoring.stats import activation_scores
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.score.params import ScoreStage

RECIPE = Path(__file__).resolve().parents[1] / "recipes/smollm2_135m/width.yaml"
SEQ_LEN_TOKENS, MICRO_BATCH_SIZE, NUM_BATCHES, ROUNDS = 512, 4, 2, 7
CASES: dict[str, dict[str, object]] = {
    "papers' default": {},
    "paper convention": {"convention": "paper"},
    "with runs of layers": {"block_lengths": (2, 8)},
}


def calls(run: Path, work: Path, names: list[str], use: Callable[[dict[str, Callable[[], object]]], object]) -> object:
    """use({"forward": ..., case: ...}) with a loaded model."""
    with open_session(Parallel(micro_batch_size=MICRO_BATCH_SIZE), device="cpu") as session:
        model, shape = load_model(run / "teacher", session, precision="bf16", seq_len_tokens=SEQ_LEN_TOKENS)
        size = MICRO_BATCH_SIZE
        samples = training_samples(
            run / "data", num_samples=NUM_BATCHES * size, seq_len_tokens=SEQ_LEN_TOKENS, seed=0, cache_dir=work
        )
        batches: list[Batch] = []
        for step in range(NUM_BATCHES):
            batches += step_batches(samples, session, step=step, global_batch_size=size, micro_batch_size=size)

        def forward() -> None:
            with evaluating(model):
                forward_batches(model, batches, session, lambda *_: None)

        def scoring(case: str) -> Callable[[], object]:
            params = ScoreStage.model_validate({"kind": "score", "seq_len_tokens": SEQ_LEN_TOKENS, **CASES[case]})
            return lambda: activation_scores(model, shape, batches, params, session)

        return use({name: forward if name == "forward" else scoring(name) for name in names})


def peak_gib(run: Path, work: Path, name: str) -> float:
    """Peak resident memory of a process that does this twice."""

    def twice(found: dict[str, Callable[[], object]]) -> None:
        found[name]()
        found[name]()

    calls(run, work, [name], twice)
    return memory_gib("VmHWM")


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        api.run(api.load_recipe(RECIPE, [f"execution.run_root={root}"]), until="data")
        run, work, names = Path(root) / "smollm2_135m/width", Path(root) / "index", ["forward", *CASES]
        times = calls(run, work, names, lambda found: interleaved(found, ROUNDS))
        assert isinstance(times, dict)
        memory = {}
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[name] = pool.apply(peak_gib, (run, work, name))
    ratios = {
        name: {"time": times[name] / times["forward"], "memory": memory[name] / memory["forward"]} for name in CASES
    }
    tokens = SEQ_LEN_TOKENS * MICRO_BATCH_SIZE * NUM_BATCHES
    print(json.dumps({"tokens": tokens, "seconds": times, "peak_gib": memory, "over_forward": ratios}, indent=2))


if __name__ == "__main__":
    main()
