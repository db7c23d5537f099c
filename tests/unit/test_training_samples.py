"""The samples of a run depend on weights, seed and step, and not on the layout."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.errors import DataError
from tests.support.tiny_data import add_document

SEQ_LEN = 16


@pytest.fixture
def two_sources(tmp_path: Path) -> Path:
    """Source 0 holds only token 1, source 1 only token 2; weights 3 and 1."""
    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    facts = []
    for number, weight in ((0, 3.0), (1, 1.0)):
        with indexed_writers(tmp_path / f"train_{number:02d}", vocab_size=8) as (writer,):
            for _ in range(30):
                add_document(writer, np.full(40, number + 1), 40)
        facts.append(
            {"prefix": f"train_{number:02d}", "source": f"s{number}", "weight": weight, "num_tokens": writer.num_tokens}
        )
    (tmp_path / "data.json").write_text(json.dumps({"vocab_size": 8, "eod_id": 0, "train": facts}))
    return tmp_path


def _samples(data: Path, cache: Path, seed: int = 0, num_samples: int = 64) -> list[torch.Tensor]:
    from nemo_minitron.backends.megatron.data.datasets import training_samples
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.schema.execution import Parallel

    with open_session(Parallel(), device="cpu"):
        samples = training_samples(data, num_samples=num_samples, seq_len_tokens=SEQ_LEN, seed=seed, cache_dir=cache)
        return [samples[i]["tokens"] for i in range(num_samples)]


def test_sources_are_drawn_by_weight(two_sources: Path, tmp_path: Path) -> None:
    drawn = [int(tokens[0]) for tokens in _samples(two_sources, tmp_path / "cache")]
    assert drawn.count(1) == 48
    assert drawn.count(2) == 16


def test_what_was_drawn_of_each_source_follows_from_the_step(two_sources: Path, tmp_path: Path) -> None:
    """The counts, also those of a part and of a single source, equal a count of the samples themselves."""
    facts = json.loads((two_sources / "data.json").read_text())
    for sources in (facts["train"], facts["train"][:1]):
        (two_sources / "data.json").write_text(json.dumps({**facts, "train": sources}))
        job, tokens = _job(two_sources, tmp_path / f"work{len(sources)}")
        for num_steps in (0, 1, 3, 10):
            seen = [int(sample[0]) for sample in tokens[: 5 * num_steps]]
            drawn = [SEQ_LEN * seen.count(number + 1) for number in range(len(sources))]
            assert sum(drawn) == num_steps * job.tokens_per_step
            assert job.data_used(num_steps) == [
                {"source": f"s{n}", "weight": source["weight"], "tokens": drawn[n], "epochs": drawn[n] / 1200}
                for n, source in enumerate(sources)
            ]
    assert job.data_used(10)[0]["epochs"] == 10 * 5 * SEQ_LEN / 1200


def _job(data: Path, work: Path) -> tuple[Any, list[torch.Tensor]]:
    from types import SimpleNamespace

    from nemo_minitron.backends.megatron.data.datasets import training_samples, training_sources
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training.loop import Job
    from nemo_minitron.schema.execution import Parallel

    keys: dict[str, Any] = dict.fromkeys(("trainable", "shape", "session", "objective"))
    with open_session(Parallel(), device="cpu"):
        samples = training_samples(data, num_samples=50, seq_len_tokens=SEQ_LEN, seed=0, cache_dir=work)
        params: Any = SimpleNamespace(global_batch_size=5, seq_len_tokens=SEQ_LEN)
        sources = training_sources(data)
        job = Job(params, 10, samples=samples, sources=sources, flops_per_token=1.0, **keys)
        return job, [samples[i]["tokens"] for i in range(50)]


def test_the_same_seed_gives_the_same_samples(two_sources: Path, tmp_path: Path) -> None:
    first, again = (
        torch.stack(_samples(two_sources, tmp_path / f"cache{number}", seed)) for number, seed in enumerate((0, 0))
    )
    assert torch.equal(first, again)


def test_data_parallel_ranks_share_out_the_samples_of_a_step() -> None:
    from types import SimpleNamespace

    from nemo_minitron.backends.megatron.data.datasets import step_batches
    from nemo_minitron.schema.execution import Parallel

    rows = [{key: torch.tensor([i]) for key in ("tokens", "labels", "loss_mask")} for i in range(24)]

    def seen(dp: int, micro: int) -> list[int]:
        out = []
        for dp_rank in range(dp):
            session = SimpleNamespace(parallel=Parallel(dp=dp), dp_rank=dp_rank, device="cpu")
            for batch in step_batches(rows, session, step=1, global_batch_size=8, micro_batch_size=micro):
                out += batch["tokens"].flatten().tolist()
        return out

    assert seen(1, 8) == seen(1, 2) == seen(2, 4) == seen(4, 1) == list(range(8, 16))


def test_held_out_documents_alternate_between_sources_and_are_not_listed_in_memory(tmp_path: Path) -> None:
    from nemo_minitron.backends.megatron.data.datasets import heldout_rows
    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    lengths = np.full(200_000, 2)
    for number, count in enumerate((1, 200_000)):
        with indexed_writers(tmp_path / f"valid_{number:02d}", vocab_size=8) as (writer,):
            ids = np.tile([number + 1, 0], count).astype(writer.dtype)
            writer.add_run(memoryview(ids.tobytes()), lengths[:count], lengths[:count] + number)
    facts = {"vocab_size": 8, "eod_id": 0, "valid": [{"prefix": f"valid_{number:02d}"} for number in (0, 1)]}
    (tmp_path / "data.json").write_text(json.dumps(facts))
    tracemalloc.start()
    rows, num_bytes = heldout_rows(tmp_path, num_tokens=8, seq_len_tokens=8, whole_documents=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[0]["tokens"].tolist() == [0, 1, 0, 2, 0, 2, 0, 2]
    assert num_bytes == 2 + 3 * 3
    assert peak < 8e6


def test_too_little_text_for_one_sample_is_reported(two_sources: Path, tmp_path: Path) -> None:
    facts = json.loads((two_sources / "data.json").read_text())
    for source in facts["train"]:
        source["num_tokens"] = 3
    (two_sources / "data.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not one sample"):
        _samples(two_sources, tmp_path / "cache")
