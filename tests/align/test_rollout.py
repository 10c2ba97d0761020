"""Sampled answers: their probabilities are the sampler's, the seed decides them, and the figures add up."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.answers import rendered
from megachat.align.logprobs import token_logps
from megachat.align.ppo import PPO
from megachat.align.rollout import Rollout, answered, estimated, in_parts
from megachat.align.rows import Rendered, Rows, padded
from megachat.model.cross_entropy import IGNORE
from megachat.model.generate import Sampling
from megachat.train.loop import Running, Stopped
from tests.align import tiny

FREE = Sampling(temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=8)


def sample(
    run: Running, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, at_once: int
) -> list[Rendered]:
    """Each prompt with its answer."""
    answers = answered(run, prompts, seeds, sampling, at_once)
    return [rendered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_losses_probabilities_are_those_the_sampler_drew_from(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
):
    settings = [*tiny.ROLLOUTS, "batch=1", "rollout=1", f"temperature={temperature}"]
    task = tiny.stage("ppo", inputs, run, *settings)
    assert isinstance(task, PPO)
    state = tiny.running(task)
    drawn: list[torch.Tensor] = []
    choose = Sampling.choose

    def remember(self: Sampling, logits: torch.Tensor, seeds: list[int], position: int) -> torch.Tensor:
        tokens = choose(self, logits, seeds, position)
        drawn.append(torch.log_softmax(logits / temperature, -1).gather(1, tokens[:, None])[:, 0])
        return tokens

    monkeypatch.setattr(Sampling, "choose", remember)
    for number in range(5):
        drawn.clear()
        rollout = task._sample(state, number)
        assert_close(rollout.logps[rollout.rows.mask], torch.cat(drawn), atol=1e-4, rtol=0)


def test_advantages_are_whitened_and_returns_are_not():
    rows = padded([([1, 2, 3], [0, 1, 1]), ([1, 2], [0, 1])], pad=0)
    zeros = torch.zeros(2, 3)
    rollout = Rollout(rows, tensor([True, True]), torch.zeros(2), zeros, zeros, zeros, zeros)
    rewards = tensor([[0.0, 6.0, 0.0], [3.0, 0.0, 0.0]])
    advantages, returns = estimated(rollout, rewards, 1.0, 1.0)
    assert_close(returns, tensor([[6.0, 6.0, 0.0], [3.0, 0.0, 0.0]]))
    half = 0.5**0.5  # 6, 6, 3: mean 5, variance 2
    assert_close(advantages, tensor([[half, half, 0.0], [-2 * half, 0.0, 0.0]]))


def test_the_same_seed_draws_the_same_answers_and_another_draws_others(inputs: Path, run: Path):
    state = tiny.running(tiny.stage("sft", inputs, run))
    prompts = [[state.tokenizer.bos, state.tokenizer.user, token] for token in range(260, 270)]

    def draw(seed: int, at_once: int = 4) -> list[tuple[list[int], list[int]]]:
        return sample(state, prompts, [seed + row for row in range(10)], FREE, at_once)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[1:] == draw(1, 3)[1:] == draw(1, 10)[1:]  # whatever they are sampled with
    same = sample(state, [prompts[0]] * 2, [7, 8], FREE, 2)
    assert same[0] != same[1]


def test_answers_come_with_the_samplers_log_probabilities(inputs: Path, run: Path):
    state = tiny.running(tiny.stage("sft", inputs, run))
    prompts = [[state.tokenizer.bos, *range(260, 260 + count)] for count in (1, 4, 2, 7, 3)]
    answers = answered(state, prompts, range(5), FREE, at_once=2)
    both = [
        ([*prompt, *one.tokens], [0] * len(prompt) + [1] * len(one.tokens))
        for prompt, one in zip(prompts, answers, strict=True)
    ]
    assert sample(state, prompts, range(5), FREE, at_once=3) == both
    rows = padded(both, pad=0)
    logps = token_logps(state.engines["model"](rows.tokens, where=rows.mask), rows.labels, FREE.temperature)
    written = tensor([logp for one in answers for logp in one.logps])
    assert_close(written, logps[rows.mask].detach(), rtol=0, atol=1e-4)


def test_a_rollout_stops_when_it_is_asked_to_between_two_answers(inputs: Path, run: Path):
    state = tiny.running(tiny.stage("sft", inputs, run))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    state.asked = stop
    with pytest.raises(Stopped):
        answered(state, [[5, 6]] * 9, range(9), FREE, at_once=2)
    assert len(asked) == 3  # before the first answer, after the second, after the fourth


def test_an_answer_is_trained_on_with_its_stop_token_and_ends_at_the_limit_without_one(
    inputs: Path, run: Path
):
    state = tiny.running(tiny.stage("sft", inputs, run))
    prompt = [state.tokenizer.bos, state.tokenizer.user]
    wild = Sampling(temperature=50.0, top_k=0, top_p=1.0, max_new_tokens=20)  # one token in 280 is the stop
    answered = sample(state, [prompt] * 200, range(200), wild, at_once=100)
    for tokens, mask in answered:
        assert mask == [0, 0] + [1] * (len(tokens) - 2)
        assert state.tokenizer.end not in tokens[2:-1]
        assert tokens[-1] == state.tokenizer.end or len(tokens) == 22
    assert {tokens[-1] == state.tokenizer.end for tokens, _ in answered} == {True, False}


def test_parts_of_a_batch_give_what_the_batch_gives():
    rows = padded([([1, 2, 3], [0, 1, 1]), ([1, 2], [0, 1]), ([1, 4, 5], [0, 0, 1])], pad=0)
    measured = in_parts(rows, 2, lambda part: part.tokens * 2)
    assert_close(measured, rows.tokens * 2)


def test_the_figures_by_hand():
    labels = tensor([[IGNORE, 5, 6], [7, IGNORE, IGNORE]])
    nothing = torch.nan
    rollout = Rollout(
        rows=Rows(torch.zeros_like(labels), labels, torch.ones_like(labels).bool()),
        stopped=tensor([True, False]),
        scores=tensor([1.0, 3.0]),
        logps=tensor([[nothing, -1.0, -1.0], [-2.0, nothing, nothing]]),
        reference=tensor([[nothing, -1.5, -2.0], [-1.0, nothing, nothing]]),
        values=torch.zeros(2, 3),
        entropies=tensor([[nothing, 1.0, 2.0], [0.0, nothing, nothing]]),
    )
    drift = (0.5, 1.0, -1.0)
    expected = {
        "reward/mean": 2.0,
        "reward/deviation": 1.0,
        "reward/least": 1.0,
        "reward/most": 3.0,
        "kl": sum(drift) / 2,  # per answer
        "kl/k2": sum(d * d / 2 for d in drift) / 2,
        "kl/k3": sum(tensor(-d).exp().item() - 1 + d for d in drift) / 2,
        "entropy": 1.0,  # per token
        "answer/stopped": 0.5,
        "answer/length": 1.5,
        "answer/shortest": 1.0,
        "answer/longest": 2.0,
    }
    assert rollout.figures() == pytest.approx(expected)
