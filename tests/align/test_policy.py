"""Every policy loss and every estimate of KL against the exact gradient, and the clips by hand."""

from math import exp, log

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from megachat.align.logprobs import answer_logps
from megachat.align.policy import (
    Clip,
    Estimator,
    Level,
    Mean,
    above,
    cispo_loss,
    clipped_policy_loss,
    divergence,
    explained_variance,
    held_back,
    kl_rewards,
    log_ratio,
    mixed,
    overlong,
    shares,
    to_go,
    total_of,
    truncated_weights,
)
from tests.align.oracle import Everything, error

CLIP = Clip(0.2, 0.28)
LOSSES = [clipped_policy_loss, cispo_loss]


def on_policy(world: Everything, loss=clipped_policy_loss, advantages: Tensor | None = None) -> Tensor:
    """The expected gradient of the first step."""
    scores = world.scores[:, None].expand_as(world.mask) if advantages is None else advantages
    new = world.logps(world.policy)
    return world.gradient(loss(new, new.detach(), scores, world.mask, CLIP))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_step_of_every_policy_loss_follows_the_exact_gradient_of_the_score(loss):
    world = Everything()
    exact = world.exact(coefficient=0.0)
    assert error(on_policy(world, loss), exact) < 1e-12
    baseline = (world.probabilities * world.scores).sum()
    less = (world.scores - baseline)[:, None].expand_as(world.mask)
    assert error(on_policy(world, loss, less), exact) < 1e-12


def test_the_mean_over_each_answer_and_a_forgotten_stop_token_are_other_gradients():
    # What the oracle is for: these learn, too, and only it tells that they learn something else.
    world, scores = Everything(), Everything().scores[:, None]
    exact = world.exact(coefficient=0.0)
    per_answer = scores * shares(world.mask, "answer")
    assert error(on_policy(world, advantages=per_answer), exact) == pytest.approx(0.65, abs=0.15)
    without = scores * (world.mask & (world.tokens != 0))
    assert error(on_policy(world, advantages=without), exact) > 0.2


def test_gspos_gradient_is_that_of_the_mean_log_probability_of_an_answer():
    world = Everything()
    new = world.logps(world.policy)
    scores = world.scores[:, None].expand_as(world.mask)
    loss = clipped_policy_loss(new, new.detach(), scores, world.mask, CLIP, "answer")
    found = world.gradient(loss * shares(world.mask, "answer"))
    mean = answer_logps(world.logps(world.policy), world.mask) / world.mask.sum(-1)
    assert error(found, world.gradient(-world.scores * mean)) < 1e-6  # `shares` are fp32


@pytest.mark.parametrize("loss", LOSSES)
def test_an_off_policy_step_on_one_token_is_exact_within_the_clip(loss):
    # Sampled from an older policy: of one token, ratio and score give the new policy's own gradient.
    draw = torch.Generator().manual_seed(0)
    new = torch.randn(5, generator=draw, dtype=torch.float64).log_softmax(0).requires_grad_()
    old = (new.detach() + 0.05 * torch.randn(5, generator=draw, dtype=torch.float64)).log_softmax(0)
    scores, on = torch.randn(5, 1, generator=draw, dtype=torch.float64), torch.ones(5, 1).bool()
    assert held_back(new[:, None], old[:, None], scores, on, CLIP).sum() == 0
    found = (old.exp()[:, None] * loss(new[:, None], old[:, None], scores, on, CLIP)).sum()
    exact = -(new.exp() * scores[:, 0]).sum()
    gradients = [torch.autograd.grad(one, new)[0] for one in (found, exact)]
    assert error(*gradients) < 1e-12


def test_weights_make_up_for_a_sampler_that_is_not_the_policy_until_they_are_truncated():
    draw = torch.Generator().manual_seed(0)
    new, sampled = (torch.randn(5, 1, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    new, on = new.requires_grad_(), torch.ones(5, 1).bool()
    loss = clipped_policy_loss(new, new.detach(), torch.randn(5, 1, generator=draw), on, CLIP)
    exact = torch.autograd.grad((new.detach().exp() * loss).sum(), new, retain_graph=True)[0]
    errors = []
    for cap in (1e6, 1.5):
        weights = truncated_weights(new, sampled, on, cap)
        assert weights.max() <= cap
        assert not weights.requires_grad
        found = (sampled.exp() * weights * loss).sum()
        errors.append(error(torch.autograd.grad(found, new, retain_graph=True)[0], exact))
    assert errors[0] < 1e-12
    assert errors[1] > 0.1


@pytest.mark.parametrize(("baseline", "share"), [("none", 1.0), ("group", 0.5), ("others", 1.0)])
def test_the_expected_gradient_of_every_group_of_two(baseline, share: float):
    # All 1,600 pairs: the mean of the others leaves the gradient as it is, the group's own halves it.
    world = Everything()
    one, other = torch.cartesian_prod(torch.arange(40), torch.arange(40)).unbind(-1)
    better = above(torch.stack([world.scores[one], world.scores[other]], -1), baseline)
    weights = world.probabilities[one] * world.probabilities[other]
    logps = answer_logps(world.logps(world.policy), world.mask)
    loss = -(weights * (better[:, 0] * logps[one] + better[:, 1] * logps[other])).sum() / 2
    found = torch.autograd.grad(loss, world.policy)[0]
    assert error(found, share * world.exact(coefficient=0.0)) < 1e-12


def test_two_answers_by_their_deviation_are_a_match_and_grpo_climbs_the_wins_over_itself():
    # (a - b) / 2 by |a - b| / sqrt(2): only which one is better is left.
    world = Everything()
    assert_close(above(tensor([[3.0, 1.0]]), "group", by_deviation=True), tensor([[0.5, -0.5]]) * 2**0.5)
    one, other = torch.cartesian_prod(torch.arange(40), torch.arange(40)).unbind(-1)
    scores = torch.stack([world.scores[one], world.scores[other]], -1)
    better = above(scores, "group", by_deviation=True)
    weights = world.probabilities[one] * world.probabilities[other]
    logps = answer_logps(world.logps(world.policy), world.mask)
    loss = -(weights * (better[:, 0] * logps[one] + better[:, 1] * logps[other])).sum()
    found = torch.autograd.grad(loss, world.policy)[0]
    policy = answer_logps(world.logps(world.policy), world.mask).exp()
    wins = (policy[:, None] * policy.detach() * (world.scores[:, None] - world.scores).sign()).sum()
    assert (
        error(found, -(2**0.5) * torch.autograd.grad(wins, world.policy)[0]) < 1e-4
    )  # 1e-6 beside the deviation


def kl_gradient(world: Everything, estimator: Estimator) -> tuple[float, Tensor]:
    """The expected value and gradient of an estimate in the loss, on policy."""
    new = world.logps(world.policy)
    loss = divergence(new, new.detach(), world.logps(world.reference), world.mask, estimator)
    value = (world.probabilities * loss.sum(-1)).sum().item()
    return value, world.gradient(loss)


@pytest.mark.parametrize(
    ("estimator", "least", "most"),
    [("exact", 0.0, 1e-12), ("k1", 1.0, 1.0), ("k2", 0.3, 0.6), ("k3", 0.6, 0.9)],
)
def test_the_gradient_of_kl_in_the_loss(estimator: Estimator, least: float, most: float):
    world = Everything()
    kl, exact = world.divergence()
    value, found = kl_gradient(world, estimator)
    assert least - 1e-9 <= error(found, exact) <= most + 1e-9
    if estimator != "k2":  # whose value is another's: of half the squared drift
        assert value == pytest.approx(kl, abs=1e-12)


def test_k2_is_exact_of_a_single_token_and_k3_is_not():
    draw = torch.Generator().manual_seed(1)
    logits, reference = (torch.randn(4, generator=draw, dtype=torch.float64) for _ in range(2))
    policy = logits.requires_grad_().log_softmax(0)[:, None]
    frozen, on = reference.log_softmax(0)[:, None], torch.ones(4, 1).bool()
    exact = torch.autograd.grad((policy.exp() * (policy - frozen)).sum(), logits, retain_graph=True)[0]

    def gradient(estimator: Estimator) -> Tensor:
        terms = divergence(policy, policy.detach(), frozen, on, estimator)
        return torch.autograd.grad((policy.detach().exp() * terms).sum(), logits, retain_graph=True)[0]

    assert error(gradient("k2"), exact) < 1e-12
    assert error(gradient("exact"), exact) < 1e-12
    assert error(gradient("k3"), exact) > 0.1


def test_k1_in_the_reward_is_exact_paid_to_go_or_at_the_end():
    world = Everything()
    exact = world.exact(coefficient=0.3)
    old = world.logps(world.policy).detach()
    rewards = kl_rewards(world.scores, old, world.logps(world.reference), world.mask, 0.3)
    whole = rewards.sum(-1, keepdim=True).expand_as(rewards)
    for advantages in (to_go(rewards), whole):
        assert error(on_policy(world, advantages=advantages), exact) < 1e-12


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_the_gradient_of_each_estimate_by_hand(estimator: Estimator):
    drift, moved = tensor([[0.5, -1.0]]), tensor([[0.1, 0.2]])
    new = torch.zeros(1, 2, requires_grad=True)
    terms = divergence(new, -moved, -drift, torch.ones(1, 2).bool(), estimator)
    first, second = exp(0.1), exp(0.1 + 0.2)  # the ratio of the answer up to each token
    expected = {
        "k1": [1.0, 1.0],
        "k2": [0.5, -1.0],
        "k3": [1 - exp(-0.5), 1 - exp(1.0)],
        "exact": [first * 0.5 + first - second, second * -1.0 + second],
    }[estimator]
    assert_close(torch.autograd.grad(terms.sum(), new)[0], tensor([expected]))


@pytest.mark.parametrize("method", ["k1 in reward", "k2", "exact", "k3", "k1"])
def test_where_the_policy_ends_up_between_reward_and_reference(method: str):
    # One token of eight: the best policy is reference * exp(reward / beta), scaled.
    beta, draw = 0.1, torch.Generator().manual_seed(0)
    reference = torch.randn(8, generator=draw, dtype=torch.float64).log_softmax(0)
    scores, on = torch.rand(8, generator=draw, dtype=torch.float64), torch.ones(8, 1).bool()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        new = logits.log_softmax(0)[:, None]
        old = new.detach()
        paid = beta if method == "k1 in reward" else 0.0
        rewards = kl_rewards(scores, old, reference[:, None], on, paid)
        advantages = rewards - (old.exp() * rewards).sum()
        loss = clipped_policy_loss(new, old, advantages, on, CLIP)
        if method != "k1 in reward":
            loss = loss + beta * divergence(new, old, reference[:, None], on, method)  # type: ignore[arg-type]
        optimizer.zero_grad()
        (old.exp() * loss).sum().backward()
        optimizer.step()
    best = torch.softmax(reference + scores / beta, 0)
    distance = 0.5 * (torch.softmax(logits.detach(), 0) - best).abs().sum().item()
    if method in ("k1 in reward", "k2", "exact"):
        assert distance < 2e-3
    else:
        assert distance > (0.5 if method == "k1" else 0.05)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.27, 1.0, -1.27, -1.27),  # clip-higher: likelier up to 1.28
        (1.29, 1.0, -1.28, 0.0),
        (0.81, -1.0, 0.81, 0.81),
        (0.79, -1.0, 0.8, 0.0),
        (2.9, -1.0, 2.9, 2.9),
        (3.1, -1.0, 3.0, 0.0),  # dual clip: no more than 3 times, however far it went the wrong way
        (3.1, 1.0, -1.28, 0.0),
        (0.1, 1.0, -0.1, -0.1),
    ],
)
def test_each_side_has_its_own_clip(ratio: float, advantage: float, loss: float, gradient: float):
    new, old, on = tensor([[log(ratio)]], requires_grad=True), tensor([[0.0]]), tensor([[True]])
    clip = Clip(0.2, 0.28, dual=3.0)
    out = clipped_policy_loss(new, old, tensor([[advantage]]), on, clip)
    out.sum().backward()
    assert_close(out.detach(), tensor([[loss]]))
    assert_close(new.grad, tensor([[gradient]]))
    assert held_back(new.detach(), old, tensor([[advantage]]), on, clip).item() is (gradient == 0)


@pytest.mark.parametrize(("ratio", "weight"), [(2.0, 1.28), (1.1, 1.1), (0.1, 0.8)])
def test_cispo_bounds_the_gradient_and_cuts_none(ratio: float, weight: float):
    new, on = tensor([[log(ratio)]], requires_grad=True), tensor([[True]])
    cispo_loss(new, tensor([[0.0]]), tensor([[2.0]]), on, CLIP).sum().backward()
    assert_close(new.grad, tensor([[-2 * weight]]))


def test_a_second_epoch_leaves_alone_what_is_clipped_and_moves_the_rest():
    # T5: a frozen batch, after a step; the sign of the advantage and the side decide.
    old = torch.zeros(2, 4)
    new = tensor([[0.5, -0.5, 0.1, -0.1], [0.5, -0.5, 0.1, -0.1]], requires_grad=True)
    advantages = tensor([[1.0], [-1.0]]).expand(2, 4)
    mask = torch.ones(2, 4).bool()
    clipped_policy_loss(new, old, advantages, mask, CLIP).sum().backward()
    assert new.grad is not None
    assert (new.grad == 0).tolist() == [[True, False, False, False], [False, True, False, False]]
    assert ((new.grad == 0) == held_back(new.detach(), old, advantages, mask, CLIP)).all()


def test_an_answers_ratio_is_the_geometric_mean_over_its_actions_alone():
    mask = tensor([[True, True, False], [True, False, False]])
    new = tensor([[0.4, 0.2, torch.nan], [-1.0, 5.0, torch.nan]])
    assert_close(
        log_ratio(new, torch.zeros(2, 3), mask, "answer"), tensor([[0.3, 0.3, 0.0], [-1.0, 0.0, 0.0]])
    )


@pytest.mark.parametrize("level", ["token", "answer"])
def test_nan_in_masked_slots_is_harmless_in_every_function(level: Level):
    mask = tensor([[True, False]])
    new = tensor([[-1.0, torch.nan]], requires_grad=True)
    noisy = tensor([[-1.0, torch.nan]])
    total = sum(loss(new, noisy, noisy, mask, CLIP, level).sum() for loss in LOSSES)
    for estimator in ("k1", "k2", "k3", "exact"):
        total = total + divergence(new, noisy, noisy - 0.5, mask, estimator).sum()  # type: ignore[arg-type]
    total = total + truncated_weights(new, noisy, mask, 2.0).sum()
    assert isinstance(total, Tensor)
    total.backward()
    assert total.isfinite()
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert new.grad[0, 1] == 0


def test_group_baselines_by_hand():
    scores = tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]])
    assert_close(above(scores, "group"), tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]))
    third = 2 / 3
    assert_close(above(scores, "others"), tensor([[third, -third, -third, third], [0.0] * 4]))
    deviation = (1 / 3) ** 0.5  # four times a quarter, by three
    expected = tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]) / deviation
    assert_close(above(scores, "group", by_deviation=True), expected, rtol=1e-5, atol=0)
    assert mixed(scores).tolist() == [True, False]


def test_a_group_without_spread_has_no_advantage_at_all():
    # .1 has no exact mean in binary: without care the rest is divided by next to nothing.
    for size in (3, 7, 16):
        flat = torch.full((1, size), 0.1)
        for baseline in ("group", "others"):
            assert above(flat, baseline, by_deviation=True).tolist() == [[0.0] * size]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [("token", (1 + 2 + 3 + 10) / 4), ("answer", (2 + 10) / 2), ("constant", (6 / 8 + 10 / 8) / 2)],
)
def test_what_a_loss_is_the_mean_over_does_not_depend_on_micro_batches(mean: Mean, expected: float):
    losses = tensor([[1.0, 2.0, 3.0], [10.0, torch.inf, torch.inf]])
    mask = tensor([[True, True, True], [True, False, False]])

    def summed(rows: slice) -> tuple[Tensor, float]:
        counted = torch.where(mask[rows], losses[rows], 0.0)
        return (shares(mask[rows], mean, 8) * counted).sum(), total_of(mask[rows], mean)

    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        sums, totals = zip(*map(summed, parts), strict=True)
        assert sum(sums) / sum(totals) == pytest.approx(expected)


def test_a_row_without_an_action_counts_nothing():
    nothing = torch.zeros(1, 3).bool()
    assert [total_of(nothing, mean) for mean in ("token", "answer", "constant")] == [0, 0, 0]  # type: ignore[arg-type]
    assert shares(nothing, "answer").tolist() == [[0.0] * 3]


def test_overlong_answers_are_punished_by_degrees():
    assert_close(overlong(tensor([80, 90, 95, 100]), 100, 10), tensor([0.0, 0.0, -0.5, -1.0]))
    assert overlong(tensor([100]), 100, 0).tolist() == [0.0]


def test_the_explained_variance_by_hand():
    returns, mask = tensor([[1.0, 2.0, 3.0, 9.0]]), tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0
    half = tensor([[1.5, 2.0, 2.5, 0.0]])  # misses by -.5, 0, .5: a quarter of the variance is left
    assert explained_variance(half, returns, mask) == pytest.approx(0.75)
