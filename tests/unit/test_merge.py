"""Head merging, computed by hand and on files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_minitron.families import ModelShape
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.merge import head_partners, merge_heads
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.stages.select.params import SelectStage
from nemo_minitron.system.progress import Progress
from tests.support.tiny_models import tiny_model_dir

HEADS = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])


@pytest.mark.parametrize(
    ("how", "expected"), [("printed", [20.0 - 1, 40.0 - 2]), ("opposite", [1.0, 2.0]), ("mean", [5.5, 11.0])]
)
def test_a_kept_head_takes_in_a_cut_one(how: str, expected: list[float]) -> None:
    merged = merge_heads(HEADS.reshape(6, 1), 0, {1: 0}, kv_channels=2, how=how)
    assert merged.reshape(3, 2).tolist() == [HEADS[0].tolist(), expected, HEADS[2].tolist()]
    columns = merge_heads(HEADS.reshape(1, 6), 1, {1: 0}, kv_channels=2, how=how)
    assert torch.equal(columns, merged.T)


def _shape(heads: int, groups: int) -> ModelShape:
    from tests.unit.test_search import SOURCE

    return SOURCE.resized(num_attention_heads=heads, num_query_groups=groups)


def test_partners_mirror_each_other_around_the_cut() -> None:
    # Sorted: 3 1 0 2 4 | K = 3 keeps 3 1 0; 2K - i + 1: the third takes the fourth (2), the second the fifth (4).
    scores = torch.tensor([5.0, 7.0, 4.0, 9.0, 1.0])
    assert head_partners(scores, (0, 1, 3), (0,), _shape(5, 1)) == {0: 2, 1: 4}


def test_more_cut_than_kept_heads_leave_some_out() -> None:
    scores = torch.tensor([5.0, 7.0, 4.0, 9.0])
    assert head_partners(scores, (3,), (0,), _shape(4, 1)) == {3: 1}


def test_heads_of_one_group_stay_among_themselves_and_without_groups_all_are_one() -> None:
    scores = torch.tensor([4.0, 3.0, 1.0, 2.0])
    assert head_partners(scores, (0, 3), (0, 1), _shape(4, 2)) == {0: 1, 3: 2}
    assert head_partners(scores, (0, 1), (0, 1), _shape(4, 4)) == {1: 3, 0: 2}
    assert head_partners(scores, (0,), (0,), _shape(4, 2)) == {0: 1}, "a group that goes is merged into none"


@pytest.mark.parametrize("case", ["llama_gqa_tied", "llama_mha"])
def test_merged_heads_reach_the_files(case: str, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_model_dir(tmp_path, case))
    scores = {"heads": torch.arange(8.0).flip(0).repeat(4, 1)}
    found = {}
    for how in ("off", "printed"):
        stage = SelectStage.model_validate({"kind": "select", "target": {"num_attention_heads": 4}, "head_merge": how})
        out = tmp_path / how
        out.mkdir()
        prune_checkpoint(source.path, choose_keep(scores, source.shape, stage), out, Progress(silent=True))
        found[how] = Checkpoint.open(out)
    size = source.shape.kv_channels
    # Heads are in order of importance. GQA: pairs (0, 1), (2, 3); MHA: 3 takes in 4.
    kept, cut, place = (0, 1, 0) if case == "llama_gqa_tied" else (3, 4, 3)
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = source.read(name)
    expected = 2 * whole[kept * size : (kept + 1) * size] - whole[cut * size : (cut + 1) * size]
    torch.testing.assert_close(found["printed"].read(name)[place * size : (place + 1) * size], expected)
    keys = [checkpoint.read("model.layers.1.self_attn.k_proj.weight") for checkpoint in found.values()]
    assert torch.equal(*keys) == (case == "llama_gqa_tied"), "shared keys are left alone"
