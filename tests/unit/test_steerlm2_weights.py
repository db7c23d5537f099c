"""SteerLM 2.0: probabilities of ratings, weights of answers, sampling, and the file of finished batches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta

from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.data.chat.templates import set_template
from nemo_minitron.evaluation.attribute_likelihood import (
    answer_weights,
    attributes_log_prob,
    distance_to_uniform,
    effective_answers,
    rating_log_prob,
)
from nemo_minitron.evaluation.sampling import Sampling, sampled_answers
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.stages.common.batch_file import BatchFile
from tests.support.tiny_models import load_transformers, tiny_model_dir


@pytest.mark.parametrize("prediction", [0.0, 0.3, 1.0, 2.2, 3.5, 4.0, 5.0])
def test_probabilities_of_ratings_are_masses_of_a_beta_distribution(prediction: float) -> None:
    mean = min(max(prediction / 4, 0.01), 0.99)
    density = beta(24 * mean, 24 * (1 - mean)).pdf
    for rating in (1, 2, 3):
        expected, _ = quad(density, (rating - 0.5) / 4, (rating + 0.5) / 4, epsabs=0.0, epsrel=1e-9)
        assert rating_log_prob(prediction, rating) == pytest.approx(math.log(expected), rel=1e-5)
    assert sum(math.exp(rating_log_prob(prediction, rating)) for rating in range(5)) == pytest.approx(1.0, abs=1e-9)


def test_a_prediction_makes_the_nearest_rating_the_most_probable() -> None:
    for prediction in (-0.5, 0.2, 1.1, 1.9, 3.2, 3.8, 4.4):
        logs = [rating_log_prob(prediction, rating) for rating in range(5)]
        assert np.isfinite(logs).all()
        assert int(np.argmax(logs)) == min(max(round(prediction), 0), 4)


def test_requested_attributes_are_independent_and_others_do_not_count() -> None:
    predictions = [0.1 * index for index in range(len(ATTRIBUTES))]
    found = attributes_log_prob(predictions, {"verbosity": 2, "quality": 0})
    assert found == pytest.approx(rating_log_prob(0.8, 2) + rating_log_prob(0.0, 0))


def test_weights_are_the_normalized_importance_weights() -> None:
    logs = [[-3.0, -1.0, -2.5], [-40.0, -38.0, -45.0], [-39.0, -39.5, -41.0]]
    ratios = [math.exp(a + p - q) for a, p, q in zip(*logs, strict=True)]
    weights = answer_weights(*logs)
    assert weights == pytest.approx([ratio / sum(ratios) for ratio in ratios], rel=1e-9)
    assert effective_answers(weights) == pytest.approx(1 / sum(float(weight) ** 2 for weight in weights))
    expected = sum(float(weight) * math.log(float(weight) * 3) for weight in weights)
    assert distance_to_uniform(weights) == pytest.approx(expected)
    assert distance_to_uniform(np.array([1.0, 0.0])) == pytest.approx(math.log(2))


def test_samples_depend_on_the_seed_and_end(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama_gqa_tied")
    set_template(folder, "chatml")
    model, tokenizer = load_transformers(folder), load_tokenizer(folder)
    settings = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=120, stop_text=None)
    prompts = [tokenizer("What is two?").input_ids] * 12 + [tokenizer("Hm").input_ids] * 12
    state = torch.get_rng_state()
    first, again, other = (sampled_answers(model, tokenizer, prompts, settings, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())
    ended = [text for text in (*first, *other) if text is not None]
    assert 0 < len(ended) < 48, "a random model ends some answers, and not all"
    assert not any("<|im_end|>" in text for text in ended)


def test_a_batch_that_was_cut_off_is_computed_again(tmp_path: Path) -> None:
    file = tmp_path / "done.jsonl"
    done = BatchFile(file)
    done.append([1, 2])
    done.append({"x": "ä"})
    file.write_bytes(file.read_bytes() + b'["half')
    again = BatchFile(file)
    assert again.num_done == 2
    again.append(3)
    assert list(again) == [[1, 2], {"x": "ä"}, 3]
