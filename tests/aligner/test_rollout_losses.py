"""The losses of trainings on rewards, as NeMo-Aligner computes them, against plain formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from tests.support.aligner import quiet, require_aligner

NUM_PROMPTS, ANSWERS, LENGTH, VOCAB, PROMPT = 3, 4, 9, 16, 3


def rollouts(seed: int) -> dict[str, torch.Tensor]:
    """Answers of random lengths to three prompts; some are cut off, and one prompt has a single complete answer."""
    generator = torch.Generator().manual_seed(seed)
    count = NUM_PROMPTS * ANSWERS
    lengths = torch.randint(PROMPT + 1, LENGTH + 1, (count,), generator=generator)
    ended = torch.ones(count, dtype=torch.bool)
    ended[[1, 5]] = False
    ended[8:11] = False
    prompts = torch.arange(NUM_PROMPTS).repeat_interleave(ANSWERS)[:, None].expand(-1, PROMPT).contiguous()
    logprobs = -torch.rand(count, LENGTH - 1, generator=generator)
    return {
        "logits": torch.randn(count, LENGTH, VOCAB, generator=generator),
        "response_tokens": torch.randint(0, VOCAB, (count, LENGTH), generator=generator),
        "prompt_tokens": prompts,
        "prompt_lengths": torch.full((count,), PROMPT),
        "response_lengths": lengths,
        "rewards": torch.randn(count, generator=generator),
        "logprobs": logprobs,
        "init_logprobs": logprobs - 0.1 * torch.randn(count, LENGTH - 1, generator=generator),
        "is_end": ended,
    }


def plain_reinforce(rows: dict[str, torch.Tensor], penalty: float) -> dict[str, torch.Tensor]:
    """- mean over answers, mean over tokens of log pi * (reward - penalty * mean |log pi / pi_start| - baseline).

    The baseline is the mean of the prompt's other answers that ended (RLOO). A cut-off answer has the mean of the ended
    ones as well, but divided by one less than their number; a prompt with at most one ended answer teaches nothing; and
    an answer that was cut off teaches nothing.
    """
    logits = rows["logits"].double().requires_grad_()
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, rows["response_tokens"][:, 1:, None])[..., 0]
    parts = [slice(PROMPT - 1, int(length) - 1) for length in rows["response_lengths"]]
    drift = (rows["logprobs"] - rows["init_logprobs"]).abs().double()
    rewards = torch.stack(
        [reward - penalty * drift[i, parts[i]].mean() for i, reward in enumerate(rows["rewards"].double())]
    )
    ended = rows["is_end"].double()
    baseline = torch.empty_like(rewards)
    for i in range(len(rewards)):
        same = [j for j in range(len(rewards)) if j // ANSWERS == i // ANSWERS]
        num_ended = sum(float(ended[j]) for j in same)
        others = sum(rewards[j] * ended[j] for j in same if j != i)
        baseline[i] = rewards[i] if num_ended <= 1 else others / (num_ended - 1)
    losses = [-(log_probs[i, parts[i]] * (rewards[i] - baseline[i])).mean() * ended[i] for i in range(len(rewards))]
    loss = torch.stack(losses).mean()
    return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, logits)[0], "baseline": baseline}


def plain_ppo(
    rows: dict[str, torch.Tensor], keys: dict[str, float], *, critic_by_answer: bool = False
) -> dict[str, torch.Tensor]:
    """The clipped loss (1707.06347, eq. 7) with advantages by GAE (1506.02438), and the critic's clipped loss.

    The reward is at the last token, minus the penalty for log pi - log pi_start at every token. The actor's loss is the
    mean over answers of the mean over tokens, where an answer that was cut off counts 0; the critic's is the mean over
    the tokens of all answers, which are one micro-batch, or, by answer, the mean of their means.
    """
    count = len(rows["rewards"])
    parts = [slice(PROMPT - 1, int(length) - 1) for length in rows["response_lengths"]]
    values = rows["values"].double()
    drift = (rows["logprobs"] - rows["init_logprobs"]).double()
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for i, part in enumerate(parts):
        rewards = -keys["initial_policy_kl_penalty"] * drift[i]
        rewards[part.stop - 1] += rows["rewards"][i]
        carried = torch.tensor(0.0, dtype=torch.float64)
        for t in reversed(range(part.start, part.stop)):
            following = values[i, t + 1] if t + 1 < part.stop else 0.0
            delta = rewards[t] + keys["discount_factor"] * following - values[i, t]
            carried = delta + keys["discount_factor"] * keys["gae_lambda"] * carried
            advantages[i, t], returns[i, t] = carried, carried + values[i, t]
    logits = rows["logits"].double().requires_grad_()
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, rows["response_tokens"][:, 1:, None])[..., 0]
    ratio, eps = (log_probs - rows["logprobs"]).exp(), keys["ratio_eps"]
    worse = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - eps, 1 + eps))
    loss = torch.stack([worse[i, parts[i]].mean() * rows["is_end"][i] for i in range(count)]).mean()
    new = rows["new_values"].double().requires_grad_()
    clip, tokens = keys["loss_clip_val"], []
    for i, part in enumerate(parts):
        moved = values[i, part] + (new[i, part] - values[i, part]).clamp(-clip, clip)
        tokens.append(torch.max((moved - returns[i, part]) ** 2, (new[i, part] - returns[i, part]) ** 2))
    means = torch.stack([each.mean() for each in tokens])
    critic_loss = 0.5 * (means.mean() if critic_by_answer else torch.cat(tokens).mean())
    return {
        "loss": loss.detach(),
        "grad": torch.autograd.grad(loss, logits)[0],
        "critic_loss": critic_loss.detach(),
        "critic_grad": torch.autograd.grad(critic_loss, new)[0],
    }


PPO_KEYS = {
    "initial_policy_kl_penalty": 0.2,
    "discount_factor": 0.97,
    "gae_lambda": 0.9,
    "ratio_eps": 0.2,
    "loss_clip_val": 0.3,
}


@pytest.mark.parametrize("processes", [1, 2])
def test_ppo_is_its_formula(tmp_path: Path, processes: int) -> None:
    require_aligner()
    rows, generator = rollouts(seed=processes), torch.Generator().manual_seed(7)
    count = len(rows["rewards"])
    rows["values"] = torch.randn(count, LENGTH - 1, generator=generator)
    rows["new_values"] = torch.randn(count, LENGTH, generator=generator)
    # Close to the policy that is trained, so that some ratios are clipped and others are not.
    chosen = rows["logits"].log_softmax(-1)[:, :-1].gather(-1, rows["response_tokens"][:, 1:, None])[..., 0]
    rows["logprobs"] = chosen + 0.3 * torch.randn(chosen.shape, generator=generator)
    save_file(rows, tmp_path / "inputs.safetensors")
    settings = {**PPO_KEYS, "use_absolute_kl": False, "normalize_advantages": False, "entropy_bonus": 0.0}
    task = {
        "inputs": str(tmp_path / "inputs.safetensors"),
        "out": str(tmp_path / "found.safetensors"),
        "settings": settings,
    }
    work = tmp_path / "work"
    run_task("ppo_loss", task, work, work / "log.txt", *quiet(), num_processes=processes, threads=1)
    found, plain = load_file(tmp_path / "found.safetensors"), plain_ppo(rows, PPO_KEYS)
    for name, expected in plain.items():
        torch.testing.assert_close(found[name].double().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("processes", "penalty"), [(1, 0.0), (1, 0.3), (2, 0.3)])
def test_reinforce_is_its_formula(tmp_path: Path, processes: int, penalty: float) -> None:
    require_aligner()
    rows = rollouts(seed=processes)
    save_file(rows, tmp_path / "inputs.safetensors")
    task = {
        "inputs": str(tmp_path / "inputs.safetensors"),
        "out": str(tmp_path / "found.safetensors"),
        "settings": {"initial_policy_kl_penalty": penalty, "use_absolute_kl": True},
    }
    work = tmp_path / "work"
    run_task("reinforce_loss", task, work, work / "log.txt", *quiet(), num_processes=processes, threads=1)
    found, plain = load_file(tmp_path / "found.safetensors"), plain_reinforce(rows, penalty)
    for name, expected in plain.items():
        torch.testing.assert_close(found[name].double().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
