"""Metrics from sums, computed by hand."""

from __future__ import annotations

import math

import numpy as np

from nemo_minitron.data.windows import heldout_windows
from nemo_minitron.evaluation.metrics import bits_per_byte, perplexity, recovered_share


def test_bits_per_byte_of_a_fair_coin_for_each_byte_is_one() -> None:
    assert bits_per_byte(8 * math.log(2), 8) == 1.0


def test_perplexity_of_a_uniform_choice_is_its_number() -> None:
    assert math.isclose(perplexity(math.log(50)), 50)
    assert perplexity(1e6) == math.inf


def test_recovered_share() -> None:
    assert recovered_share(1.0, 2.0, 1.25) == 0.75
    assert recovered_share(1.0, 1.0, 1.0) is None


def test_windows_predict_every_text_token_once() -> None:
    documents = [np.array([5, 6, 7, 0]), np.array([8, 9, 0]), np.array([1, 2, 0])]
    windows = heldout_windows(documents, [30, 20, 10], eod_id=0, num_tokens=6, seq_len_tokens=4)
    # The stream: 0 5 6 7 0 8 9 0, of the first two documents.
    assert windows.tokens.tolist() == [[0, 5, 6, 7, 0], [0, 8, 9, 0, 0]]
    assert windows.loss_mask.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert windows.num_bytes == 50
    labels = windows.tokens[:, 1:][windows.loss_mask]
    assert sorted(labels.tolist()) == [5, 6, 7, 8, 9]
