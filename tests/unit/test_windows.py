"""Held-out windows, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_minitron.data.windows import Windows, heldout_windows

EOD = 0
DOCUMENTS = [np.array(ids, dtype=np.uint16) for ids in ([1, 2, 3, EOD], [4, EOD], [5, 6, 7, 8, 9, EOD])]
SIZES = [30, 40, 50]


def windows(num_tokens: int, seq_len_tokens: int) -> Windows:
    return heldout_windows(DOCUMENTS, SIZES, eod_id=EOD, num_tokens=num_tokens, seq_len_tokens=seq_len_tokens)


def test_windows_by_hand() -> None:
    # stream: 0 | 1 2 3 0 | 4 0 | 5 6 7 8 9 0
    found = windows(num_tokens=100, seq_len_tokens=5)
    assert found.tokens.tolist() == [[0, 1, 2, 3, 0, 4], [4, 0, 5, 6, 7, 8], [8, 9, 0, 0, 0, 0]]
    assert found.loss_mask.tolist() == [
        [True, True, True, False, True],
        [False, True, True, True, True],
        [True, False, False, False, False],
    ]
    assert found.num_bytes == 120


def test_whole_documents_are_taken_until_there_are_enough_tokens() -> None:
    assert windows(4, 8).num_bytes == 30
    assert windows(5, 8).num_bytes == 70
    assert windows(5, 8).tokens.tolist() == [[0, 1, 2, 3, 0, 4, 0, 0, 0]]


@pytest.mark.parametrize("seq_len_tokens", range(1, 15))
def test_each_text_token_is_a_label_exactly_once_after_the_token_before_it(seq_len_tokens: int) -> None:
    found = windows(num_tokens=100, seq_len_tokens=seq_len_tokens)
    labels, inputs = found.tokens[:, 1:], found.tokens[:, :-1]
    assert labels[found.loss_mask].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert inputs[found.loss_mask].tolist() == [EOD, 1, 2, EOD, EOD, 5, 6, 7, 8]
    assert found.tokens.shape[1] == seq_len_tokens + 1
    assert (found.tokens[1:, 0] == found.tokens[:-1, -1]).all(), "neighbours share one token"
