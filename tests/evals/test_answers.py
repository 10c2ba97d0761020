"""Batched answers, rewards, and KL: the batch must not show in the numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megachat.evals.answers import Answer, answer, batches, best_device, context_of, divergences, rewards
from megachat.model.generate import Sampling, generate
from tests.evals import tiny

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=6)
PROMPTS = [[5, 6, 7], [5], [9, 8, 7, 6, 5], [1, 2]]


def test_batches_are_longest_first():
    assert list(batches([[1], [1, 2, 3], [1, 2]], 2)) == [[1, 2], [0]]


def test_answers_come_back_in_the_order_of_the_questions():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    answers = answer(model, tokenizer, PROMPTS, GREEDY, batch=2, stop=tokenizer.end)
    for prompt, one in zip(PROMPTS, answers, strict=True):
        alone = generate(model, [prompt], GREEDY, {tokenizer.end})[0]
        assert one == Answer(alone, tokenizer.decode(alone))


def test_a_reward_is_the_score_at_the_last_token_whatever_the_padding():
    model = tiny.reward_model()
    alone = [float(model(torch.tensor([row]))[0, -1]) for row in PROMPTS]
    assert len(set(alone)) == 4
    for batch in (1, 3):
        np.testing.assert_allclose(rewards(model, PROMPTS, batch), alone, rtol=1e-5)


def test_a_model_does_not_diverge_from_itself():
    model, answers = tiny.model(), [Answer([3, 4], "")] * 4
    np.testing.assert_allclose(divergences(model, model, PROMPTS, answers, batch=2), 0.0, atol=1e-6)


def test_kl_is_summed_over_exactly_the_answers_tokens():
    policy, reference = tiny.model(0), tiny.model(1)
    prompt, said = [5, 6, 7], [3, 4]
    tokens = torch.tensor([prompt + said])
    ours, theirs = (F.log_softmax(model(tokens), -1)[0] for model in (policy, reference))
    # Position 2 predicts the answer's first token, position 3 its second.
    expected = sum(float((ours[t].exp() * (ours[t] - theirs[t])).sum()) for t in (2, 3))
    rows, answers = [prompt, [1, 2, 3, 4, 5, 6]], [Answer(said, ""), Answer([7, 8, 9], "")]
    assert divergences(policy, reference, rows, answers, batch=2)[0] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4


def test_the_mean_kl_is_that_of_sampled_log_probabilities():
    # Two tokens are sampled from the policy: E[log p - log q] over its samples is the KL.
    policy, reference = tiny.model(0), tiny.model(1)
    with torch.no_grad():
        for model in (policy, reference):
            model.embed.weight.mul_(20)  # distributions that differ visibly
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=2)
    prompts = [[5, 6]] * 2000
    sampled = generate(policy, prompts, sampling, set(), [*range(len(prompts))])
    tokens = torch.tensor([[5, 6, *answer] for answer in sampled])
    with torch.no_grad():
        ours, theirs = (F.log_softmax(model(tokens), -1)[:, 1:3] for model in (policy, reference))
    chosen = tokens[:, 2:, None]
    ratio = (ours.gather(2, chosen) - theirs.gather(2, chosen)).sum((1, 2))
    exact = divergences(policy, reference, prompts, [Answer(one, "") for one in sampled], batch=500)
    error = float(ratio.std()) / 2000**0.5
    assert float(ratio.mean()) == pytest.approx(exact.mean(), abs=4 * error)
    assert exact.std() < float(ratio.std())


def test_the_context_is_that_of_the_trunk():
    assert context_of(tiny.model()) == context_of(tiny.reward_model()) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named():
    assert best_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU here; use device=cpu"):
        best_device("cuda")
