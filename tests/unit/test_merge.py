"""Head merging, computed by hand and on files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

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


# Heads are in order of importance. Groups of two: 0 takes in 1, and so on. Without groups 3 takes in 4, 2 takes in 5.
PAIRS = {4: {0: 1, 2: 3, 4: 5, 6: 7}, 8: {0: 7, 1: 6, 2: 5, 3: 4}}
"""Query groups of 8 heads -> kept head -> the cut one, if half of the heads are cut."""


@pytest.mark.parametrize("groups", PAIRS)
@pytest.mark.parametrize(("how", "own", "other"), [("printed", 2.0, -1.0), ("mean", 0.5, 0.5)])
def test_merged_heads_reach_the_files(groups: int, how: str, own: float, other: float, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_model_dir(tmp_path, "qwen2", num_key_value_heads=groups))
    scores = {"heads": torch.arange(8.0).flip(0).repeat(4, 1)}
    stage = SelectStage.model_validate({"kind": "select", "target": {"num_attention_heads": 4}, "head_merge": how})
    (out := tmp_path / "student").mkdir()
    prune_checkpoint(source.path, choose_keep(scores, source.shape, stage), out, Progress(silent=True))
    student = Checkpoint.open(out)

    def merged(whole: Tensor) -> Tensor:
        heads = whole.unflatten(0, (8, -1))
        return torch.cat([own * heads[kept] + other * heads[cut] for kept, cut in PAIRS[groups].items()])

    for layer in range(4):
        for part in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            name = f"model.layers.{layer}.self_attn.{part}"
            whole = source.read(name)
            is_shared = groups == 4 and not part.startswith("q_proj")
            torch.testing.assert_close(student.read(name), whole if is_shared else merged(whole))
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        torch.testing.assert_close(student.read(name), merged(source.read(name).T).T)
