"""Each preference loss by hand, at the place it converges to in closed form, and beside TRL's."""

from collections import defaultdict
from collections.abc import Callable
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from megachat.align.pairs import Pair
from megachat.align.preference import DPO, IPO, ORPO, Answers, Robust, SimPO, log_odds
from megachat.config import compose, decode

LOSSES = {
    "dpo": DPO(beta=0.1, smoothing=0.0),
    "cdpo": DPO(beta=0.1, smoothing=0.1),
    "robust": Robust(beta=0.1, wrong=0.1),
    "ipo": IPO(beta=0.1),
    "simpo": SimPO(beta=2.0, gamma=1.0),
    "orpo": ORPO(odds=0.1),
}


def answers(*logps: float, tokens: int = 1) -> Answers:
    return Answers(tensor(logps, dtype=torch.float64), torch.full((len(logps),), tokens))


def logit(share: float) -> float:
    return log(share / (1 - share))


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("dpo", logit(0.8) / 0.1),  # 13.8629
        ("cdpo", logit(0.74) / 0.1),  # .8 * .9 + .2 * .1 = .74 of the labels are believed: 10.4597
        ("robust", logit(0.875) / 0.1),  # (.8 - .1) / (1 - 2 * .1) = .875 were right at first: 19.4591
        ("ipo", 0.6 / 0.2),  # (2 * .8 - 1) / (2 beta) = 3
        # With y = exp(beta * margin) and g = exp(-gamma): .8 / (1 + y g) = .2 / (1 + g / y), so 1.0770.
        ("simpo", log((0.6 + (0.36 + 0.64 * exp(-2)) ** 0.5) / (0.4 * exp(-1))) / 2.0),
    ],
)
def test_labels_right_eight_times_in_ten_end_at_the_margin_of_the_closed_form(name: str, margin: float):
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reference = Pair(answers(-1.3), answers(-0.4))
    lead = -1.3 + 0.4 if LOSSES[name].compares else 0.0
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        policy = [Answers(one[None], tensor([1])) for one in torch.log_softmax(logits, 0)]
        right = LOSSES[name].cost(Pair(*policy), reference)
        turned = LOSSES[name].cost(Pair(*reversed(policy)), Pair(reference.rejected, reference.chosen))
        value = (0.8 * right + 0.2 * turned).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert (logits[0] - logits[1]).item() - lead == pytest.approx(margin, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("dpo", log(2)),
        ("cdpo", log(2)),
        ("robust", log(2)),  # (.9 log 2 - .1 log 2) / .8
        ("ipo", 25.0),  # 1 / (4 beta^2)
    ],
)
def test_what_a_policy_pays_that_is_its_reference(name: str, start: float):
    same = Pair(answers(-3.0, -70.0, tokens=4), answers(-9.0, -0.5, tokens=4))
    assert_close(LOSSES[name].cost(same, same), torch.full((2,), start, dtype=torch.float64))


def test_per_token_losses_divide_by_the_tokens_of_each_answer_and_dpo_does_not():
    # -8 over 4 tokens, -9 over 3: -2 and -3 a token, a lead of 1; in sums it is a lead of 1, too.
    policy = Pair(answers(-8.0, tokens=4), answers(-9.0, tokens=3))
    reference = Pair(answers(-6.0, tokens=4), answers(-6.0, tokens=3))  # -1.5 and -2: a lead of .5
    assert IPO(beta=0.25).cost(policy, reference).item() == pytest.approx((1 - 0.5 - 2) ** 2)
    assert SimPO(beta=2.0, gamma=0.5).cost(policy, reference).item() == pytest.approx(log(1 + exp(-1.5)))
    assert LOSSES["dpo"].cost(policy, reference).item() == pytest.approx(log(1 + exp(-0.1 * 1)))


def test_orpo_by_hand():
    # p = 1/2 and 1/5 a token: odds 1 and 1/4, a ratio of 4: -log sigmoid(log 4) = log 1.25; and -log 1/2.
    policy = Pair(answers(2 * log(0.5), tokens=2), answers(3 * log(0.2), tokens=3))
    assert ORPO(odds=0.1).cost(policy, policy).item() == pytest.approx(log(2) + 0.1 * log(1.25))


@pytest.mark.parametrize("logp", [0.0, -1e-9, -0.1, -0.69, -0.7, -5.0, -300.0])
def test_odds_are_finite_with_their_gradient_however_sure_the_model_is(logp: float):
    logps = tensor([logp], dtype=torch.float64, requires_grad=True)
    odds = log_odds(logps)
    odds.sum().backward()
    assert logps.grad is not None
    assert odds.isfinite().all()
    assert logps.grad.isfinite().all()
    if logp < -1e-6:
        assert odds.item() == pytest.approx(log(exp(logp) / -torch.expm1(tensor(logp).double()).item()))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_falls_as_the_reward_of_the_chosen_answer_leads(name: str):
    loss, reference = LOSSES[name], Pair(answers(-4.0, tokens=2), answers(-4.0, tokens=2))
    costs, leads = [], []
    for chosen in (-6.0, -4.0, -2.0):
        policy = Pair(answers(chosen, tokens=2), answers(-4.0, tokens=2))
        costs.append(loss.cost(policy, reference).item())
        chosen_reward, rejected_reward = (
            loss.reward(policy.chosen, reference.chosen),
            loss.reward(policy.rejected, reference.rejected),
        )
        leads.append((chosen_reward - rejected_reward).item())
    assert costs[0] > costs[1] > costs[2]
    assert leads[0] < leads[1] == 0 < leads[2]


@pytest.mark.parametrize("name", ["dpo", "robust", "ipo", "simpo", "orpo"])
def test_a_loss_is_chosen_by_its_name(name: str):
    chosen = decode(compose("dpo", [f"loss={name}"])).objective
    assert type(chosen) is type(LOSSES[name])


def some(seed: int) -> Pair[Answers]:
    """Five pairs of answers of 1 to 6 tokens, of up to 9 nats."""
    draw = torch.Generator().manual_seed(seed)

    def drawn() -> Answers:
        logps = -9 * torch.rand(5, generator=draw)
        return Answers(logps, torch.randint(1, 7, (5,), generator=draw))

    return Pair(drawn(), drawn())


def in_tokens(pair: Pair[Answers]) -> tuple[Tensor, Tensor]:
    """Log-probabilities token by token that add up to those of the answers, and TRL's mask of the tokens."""
    logps = torch.cat([pair.chosen.mean, pair.rejected.mean])
    tokens = torch.cat([pair.chosen.tokens, pair.rejected.tokens])
    mask = torch.arange(6) < tokens[:, None]
    prompt = torch.zeros(len(mask), 1, dtype=torch.bool)
    return torch.where(mask, logps[:, None], 0.0), torch.cat([prompt, mask], 1).long()


def told(logps: Tensor, **settings: Any) -> tuple[Any, Callable[..., Any]]:
    """What TRL's `_compute_loss` reads of its trainer, and a model that answers with these figures."""
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    figures = SimpleNamespace(
        log_probs=logps, entropy=logps, mean_logits=logps, is_top1=torch.ones_like(logps).bool()
    )
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=alone,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    return trainer, lambda **_: figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "smoothing"), [("dpo", "sigmoid", 0.0), ("robust", "robust", 0.1), ("ipo", "ipo", 0.0)]
)
def test_trl_computes_the_same_loss(name: str, kind: str, smoothing: float):
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, other = some(1), some(2)
    reference = Pair(
        Answers(other.chosen.logps, policy.chosen.tokens),
        Answers(other.rejected.logps, policy.rejected.tokens),
    )
    logps, mask = in_tokens(policy)
    trainer, model = told(
        logps, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        beta=0.1, label_smoothing=smoothing, use_weighting=False,
    )  # fmt: skip
    batch = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference.chosen.logps,
        "ref_rejected_logps": reference.rejected.logps,
    }
    theirs = DPOTrainer._compute_loss(trainer, model, batch, False)
    assert_close(LOSSES[name].cost(policy, reference).mean(), theirs, rtol=1e-5, atol=0)
    rewards = trainer._metrics["train"]
    ours = LOSSES["dpo"].reward(policy.chosen, reference.chosen).mean().item()
    assert ours == pytest.approx(rewards["rewards/chosen"][0], rel=1e-5)


@pytest.mark.slow
def test_trl_computes_the_same_losses_without_a_reference():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy = some(3)
    means = policy.chosen.mean, policy.rejected.mean
    trainer: Any = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=1.0, beta=2.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    assert_close(LOSSES["simpo"].cost(policy, policy), CPOTrainer.cpo_loss(trainer, *means)[0])
    trainer.beta = 0.1
    odds = -ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    assert_close(LOSSES["orpo"].cost(policy, policy), odds - policy.chosen.mean)
