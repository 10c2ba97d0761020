"""PPO's pieces by hand, and its gradient against the exact one, over all that a tiny policy can say."""

import json
import os
import secrets
import shutil
import signal
from itertools import pairwise
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from megachat.align import rollout
from megachat.align.logprobs import answer_logps
from megachat.align.policy import Clip, clipped_policy_loss, held_back, kl_rewards, log_ratio
from megachat.align.ppo import PPO, Sampled, adapted, clipped_value_loss, counted
from megachat.align.rm import last_score
from megachat.align.rollout import Rollout
from megachat.align.rows import Rows
from megachat.config import ConfigError
from megachat.model.cross_entropy import IGNORE
from megachat.model.generate import write
from megachat.model.size import NOTHING
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import Losses, Running, train_step
from tests.align import tiny
from tests.align.oracle import Everything

CLIP = Clip(0.2, 0.2)


def test_the_probabilities_of_everything_that_can_be_said_add_up_to_one():
    world = Everything()
    assert len(world.tokens) == 40  # 1 + 3 * (1 + 3 * 4)
    assert answer_logps(world.logps(world.policy), world.mask).exp().sum().item() == pytest.approx(
        1, abs=1e-12
    )


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_expected_gradient_is_exactly_that_of_reward_minus_kl(coefficient: float, critic: bool):
    world = Everything()
    exact = world.exact(coefficient)
    assert ((world.ppo(coefficient, critic) - exact).norm() / exact.norm()).item() < 1e-12


def test_rewards_are_minus_k1_and_the_score_is_paid_on_the_stop_token():
    mask = tensor([[False, True, True, False], [True, True, True, True]])
    logps = tensor([[torch.nan, -1.0, -2.0, torch.nan], [-1.0, -1.0, -1.0, -1.0]])
    reference = tensor([[0.0, -1.5, -1.0, torch.nan], [-1.0, -1.0, -1.0, -3.0]])
    rewards = kl_rewards(tensor([5.0, -2.0]), logps, reference, mask, coefficient=0.1)
    # k1: .5, -1 and 0, 0, 0, 2
    assert_close(rewards, tensor([[0.0, -0.05, 5.1, 0.0], [0.0, 0.0, 0.0, -2.2]]))


def test_a_row_without_an_action_is_paid_nothing():
    nothing = torch.zeros(1, 3)
    assert_close(kl_rewards(tensor([5.0]), nothing, nothing, torch.zeros(1, 3).bool(), 0.1), nothing)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 1.0, -1.0, -1.0),  # on policy: the plain policy gradient
        (1.0, -1.0, 1.0, 1.0),
        (1.5, 1.0, -1.2, 0.0),  # already far enough the right way: no gradient
        (1.5, -1.0, 1.5, 1.5),  # far the wrong way: pulled back at full strength
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_the_clip_takes_away_gains_and_never_the_way_back(
    ratio: float, advantage: float, loss: float, gradient: float
):
    new, old, on = tensor([[log(ratio)]], requires_grad=True), tensor([[0.0]]), tensor([[True]])
    out = clipped_policy_loss(new, old, tensor([[advantage]]), on, clip=CLIP)
    out.sum().backward()
    assert_close(out.detach(), tensor([[loss]]))
    assert_close(new.grad, tensor([[gradient]]))
    assert held_back(new.detach(), old, tensor([[advantage]]), on, clip=CLIP).item() is (gradient == 0)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # within the clip: the plain squared error, old 1, return 2
        (1.5, 0.5 * 0.8**2, 0.0),  # already moved .5 towards the return: held at 1.2
        (0.5, 0.5 * 1.5**2, -1.5),  # away from the return: pulled back
        (3.5, 0.5 * 1.5**2, 1.5),  # past the return by more than the clip would be short of it
    ],
)
def test_the_value_moves_at_most_the_clip_towards_its_return(value: float, loss: float, gradient: float):
    new, on = tensor([[value]], requires_grad=True), tensor([[True]])
    out = clipped_value_loss(new, tensor([[1.0]]), tensor([[2.0]]), on, clip=0.2)
    out.sum().backward()
    assert_close(out.detach(), tensor([[loss]]))
    assert_close(new.grad, tensor([[gradient]]))


def test_nan_in_masked_slots_reaches_neither_the_losses_nor_the_gradients():
    mask = tensor([[True, False]])
    new = tensor([[-1.0, torch.nan]], requires_grad=True)
    noisy = tensor([[-1.0, torch.nan]])
    loss = clipped_policy_loss(new, noisy, noisy, mask, CLIP) + clipped_value_loss(
        new, noisy, noisy, mask, 0.2
    )
    loss.sum().backward()
    assert_close(loss.detach(), tensor([[1.0, 0.0]]))
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert new.grad[0, 1] == 0


def test_an_absurd_ratio_stays_finite():
    far = log_ratio(tensor([[500.0, -500.0]]), tensor([[0.0, 0.0]]), tensor([[True, True]]))
    assert far.tolist() == [[20.0, -20.0]]


def test_the_policy_climbs_to_the_gibbs_distribution_of_the_reward():
    # One-token answers: the best policy under reward - beta * KL is reference * exp(reward / beta), scaled.
    beta, reference = 0.3, torch.log_softmax(tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64), 0)
    scores, on = tensor([0.9, 0.1, 0.4, 0.6], dtype=torch.float64), torch.ones(4, 1).bool()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    distances = []
    for _ in range(300):
        new = torch.log_softmax(logits, 0)[:, None]
        old = new.detach()
        rewards = kl_rewards(scores, old, reference[:, None], on, beta)
        advantages = rewards - (old.exp() * rewards).sum()
        loss = (old.exp() * clipped_policy_loss(new, old, advantages, on, CLIP)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = torch.softmax(reference + scores / beta, 0)
        distances.append(0.5 * (torch.softmax(logits.detach(), 0) - best).abs().sum().item())
    assert distances[-1] < 1e-3 < distances[0]
    assert all(after <= before + 0.02 for before, after in pairwise(distances[::50]))


class Letters(nn.Module):
    """A reward model that is right: the share of the answer `abab` and its stop that is in its place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, tokens: Tensor) -> Tensor:
        scores = torch.zeros(tokens.shape)
        for row, said in enumerate(tokens.tolist()):
            begins = said.index(self.tokenizer.assistant) + 1
            question = self.tokenizer.decode(said[:begins])
            truth = [*self.tokenizer.encode(tiny.answer(question)), self.tokenizer.end]
            right = [ours == theirs for ours, theirs in zip(said[begins:], truth, strict=False)]
            scores[row] = sum(right) / len(truth)
        return scores


def test_a_rollout_is_scored_and_its_first_step_is_on_policy(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "critic_first=0", "temperature=0.7")
    state = tiny.running(task)
    batches = task.batches(state)
    for step in range(task.steps):
        sums = train_step(
            task, state, next(batches), rate=0.0
        )  # nothing moves, so every step is like the first
        state.progress.step += 1
        assert sums["moved"] == sums["clip_fraction"] == 0, f"at step {step}"
    assert state.notes["kl"] == state.notes["kl/k3"] == 0
    assert 1 <= state.notes["answer/length"] <= 8


def test_every_answer_is_trained_on_once_in_each_epoch(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS)
    batches = task.batches(tiny.running(task))
    seen = [[row.tolist() for part in next(batches) for row in part.rows.tokens] for _ in range(4)]
    assert [len(step) for step in seen] == [16] * 4
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3])
    assert seen[0] != seen[2]


def test_each_answer_keeps_its_own_figures_when_the_order_is_shuffled(inputs: Path, run: Path):
    settings = [
        "kl=0",
        "unfinished=0",
        "gamma=1",
        "lam=1",
    ]  # the return of every token is then the answer's score
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, *settings)
    state = tiny.running(task)
    (batch, *_) = next(task.batches(state))
    mask = batch.rows.mask
    with torch.no_grad():
        values = state.engines["critic"](batch.rows.tokens)
        scores = last_score(state.frozen["reward"](batch.rows.tokens), batch.rows.real)
    assert_close(batch.values[mask], values[mask], atol=1e-5, rtol=1e-5)
    assert_close(batch.returns[mask], scores[:, None].expand_as(mask)[mask], atol=1e-5, rtol=1e-5)
    surprise = (batch.returns - batch.values)[mask]  # whitened: the same but for a shift and a scale
    assert torch.corrcoef(torch.stack([surprise, batch.advantages[mask]]))[0, 1] > 0.99999


def test_the_score_and_the_penalty_are_paid_on_the_last_token(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "kl=0.5", "unfinished=3")
    assert isinstance(task, PPO)
    labels = tensor([[IGNORE, 5, 6], [7, IGNORE, IGNORE]])
    zeros = torch.zeros(2, 3)
    rollout = Rollout(
        rows=Rows(torch.zeros_like(labels), labels, torch.ones_like(labels).bool()),
        stopped=tensor([True, False]),
        scores=tensor([1.0, 3.0]),
        logps=zeros - 1,
        reference=zeros - tensor([1.0, 1.5, 1.0]),
        values=zeros,
        entropies=zeros,
    )
    assert_close(task._rewards(rollout), tensor([[0.0, -0.25, 1.0], [0.0, 0.0, 0.0]]))


def test_while_the_critic_learns_alone_the_policy_stays(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "critic_first=1")
    state = tiny.running(task)
    before = {
        role: [parameter.detach().clone() for parameter in engine.module.parameters()]
        for role, engine in state.engines.items()
    }
    train_step(task, state, next(task.batches(state)), rate=1e-2)
    same = {
        role: all(torch.equal(a, b) for a, b in zip(before[role], engine.module.parameters(), strict=True))
        for role, engine in state.engines.items()
    }
    assert same == {"model": True, "critic": False}


def test_a_critic_without_a_finite_gradient_holds_back_the_policy(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "critic_first=0")
    state = tiny.running(task)
    batches = next(task.batches(state))
    own = PPO.loss

    def poisoned(task: PPO, state: Running, batch: Sampled) -> Losses:
        result = own(task, state, batch)
        critic = result.losses["critic"]  # a finite loss whose gradient is not
        return Losses(result.losses | {"critic": critic + (critic - critic.detach()).abs().sqrt()})

    monkeypatch.setattr(PPO, "loss", poisoned)
    before = [weight.detach().clone() for weight in state.engines["model"].module.parameters()]
    assert train_step(task, state, batches, 1e-3) == {}
    assert_close([*state.engines["model"].module.parameters()], before, rtol=0, atol=0)
    assert state.skipped.found[0].why == "a gradient of critic is not finite"
    assert all(engine.finite_weights() for engine in state.engines.values())


def test_micro_batches_of_one_add_up_to_the_batch(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "micro_batch=1", "critic_first=0")
    state = tiny.running(task)
    singles = next(task.batches(state))
    fields = ("logps", "values", "advantages", "returns")
    tensors = {name: torch.cat([getattr(one, name) for one in singles]) for name in fields}
    rows = Rows(
        *(torch.cat([getattr(one.rows, name) for one in singles]) for name in ("tokens", "labels", "real"))
    )
    tensors["logps"] = tensors["logps"] + 0.3 * torch.randn_like(tensors["logps"])  # some are clipped
    whole = Sampled(weight=0.0, work=NOTHING, samples=16, rows=rows, **tensors)
    parts = [
        Sampled(
            weight=0.0,
            work=NOTHING,
            samples=1,
            rows=rows.part(i, i + 1),
            **{n: t[i : i + 1] for n, t in tensors.items()},
        )
        for i in range(16)
    ]
    together, alone = task.loss(state, whole), [task.loss(state, part) for part in parts]
    for role, loss in together.losses.items():
        assert_close(sum(one.losses[role] for one in alone), loss, rtol=1e-4, atol=1e-4)
    assert together.metrics["clip_fraction"] > 0
    assert sum(one.metrics["clip_fraction"] for one in alone) == together.metrics["clip_fraction"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "rate", "seed"),
    [(1, 1e-3, 0), (2, 5e-4, 0), (1, 1e-3, secrets.randbelow(2**31))],
    ids=["one epoch", "two epochs", "random"],
)
def test_it_learns_what_the_reward_model_rewards(
    half_right: Path, run: Path, epochs: int, rate: float, seed: int
):
    settings = ["batch=64", "micro_batch=64", "rollout=64", "at_once=64", "max_new_tokens=6", "rollouts=40"]
    settings += [
        f"epochs={epochs}",
        "kl=0",
        "unfinished=0",
        "critic_first=2",
        "clip_value=10",
        f"seed={seed}",
    ]
    task = tiny.stage("ppo", half_right, run, *settings)
    state = tiny.running(task)
    state.frozen["reward"] = Letters(state.tokenizer)
    batches = task.batches(state)
    rewards = []
    for _ in range(state.total):
        torch.manual_seed(state.progress.step)
        train_step(task, state, next(batches), rate)
        state.progress.step += 1
        rewards.append(state.notes["reward/mean"])
    assert sum(rewards[:3]) / 3 < 0.8
    assert sum(rewards[-5:]) / 5 > (0.8 if seed else 0.9), (seed, rewards[::5])


def test_a_run_that_was_cut_off_goes_on_to_the_last_bit(inputs: Path, run: Path, tmp_path: Path):
    settings = [*tiny.ROLLOUTS, "rollouts=3", "critic_first=0", "checkpoint_interval=1", "checkpoint_keep=9"]
    whole = tmp_path / "whole"
    tiny.stage("ppo", inputs, whole, *settings).execute()
    tiny.stage("ppo", inputs, run, *settings).execute()
    # As if it had died in its third rollout: the checkpoint after the second is the newest.
    kept = sorted(path.name for path in (run / "ppo" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000008", "step-00000012"]  # never inside a rollout
    shutil.rmtree(run / "ppo" / "checkpoints" / "step-00000012")
    (run / "ppo" / "done.json").unlink()
    tiny.stage("ppo", inputs, run, *settings).execute()
    clocks = {"seconds", "tokens_per_second", "memory_gib"}
    first, second = (
        [
            {
                name: row[name]
                for name in row
                if name not in clocks and not name.startswith(("checkpoint/", "time/", "rollout/"))
            }
            for row in tiny.rows(folder, "ppo")
        ]
        for folder in (whole, run)
    )
    assert len(first) == 12
    assert first == second
    assert first[8]["kl"] != 0  # in the third rollout: the reference is where it was, the policy is not


def test_what_a_nat_costs_follows_the_distance_within_a_fifth_per_horizon():
    assert adapted(0.1, kl=12.0, target=6.0, answers=100, horizon=1000) == pytest.approx(0.102)
    assert adapted(0.1, kl=6.6, target=6.0, answers=1000, horizon=1000) == pytest.approx(0.11)
    assert adapted(0.1, kl=0.0, target=6.0, answers=1000, horizon=1000) == pytest.approx(0.08)
    assert adapted(0.1, kl=6.0, target=6.0, answers=1000, horizon=1000) == 0.1


def test_statistics_of_rewards_add_up_over_rollouts():
    state: dict[str, float] = {}
    for part in (tensor([1.0, 2.0]), tensor([6.0]), tensor([3.0, 8.0, -2.0])):
        state |= counted(state, part)
    every = tensor([1.0, 2.0, 6.0, 3.0, 8.0, -2.0])
    assert state["reward/count"] == 6
    assert state["reward/mean"] == pytest.approx(3.0)
    assert state["reward/squares"] == pytest.approx(((every - 3) ** 2).sum().item())


def test_scores_are_scaled_and_then_clipped_and_the_cost_of_a_nat_is_the_runs(inputs: Path, run: Path):
    settings = ["kl=0.5", "unfinished=0", "reward_scale=running", "reward_clip=0.8"]
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, *settings)
    assert isinstance(task, PPO)
    labels, zeros = tensor([[5], [6], [7]]), torch.zeros(3, 1)
    rollout = Rollout(
        rows=Rows(torch.zeros_like(labels), labels, torch.ones_like(labels).bool()),
        stopped=tensor([True, True, True]),
        scores=tensor([1.0, 3.0, 5.0]),
        logps=zeros - 1,
        reference=zeros - 2,
        values=zeros,
        entropies=zeros,
    )
    state = counted({}, tensor([1.0, 5.0])) | {"kl": 0.1}  # mean 3, deviation 2
    assert_close(task._rewards(rollout, state), tensor([[-0.9], [-0.1], [0.7]]))
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "kl=0.1", "unfinished=0", "reward_scale=model")
    assert isinstance(task, PPO)
    model = tiny.running(task).frozen["reward"]
    model.mean, model.deviation = 2.0, 4.0
    assert_close(task._rewards(rollout, {}, model), tensor([[-0.35], [0.15], [0.65]]))


def test_what_a_run_carries_along_goes_on_to_the_last_bit(inputs: Path, run: Path, tmp_path: Path):
    settings = [*tiny.ROLLOUTS, "critic_first=0", "checkpoint_interval=4", "checkpoint_keep=9"]
    settings += ["kl_target=0.01", "kl_horizon=100", "reward_scale=running", "reward_clip=2"]
    whole = tmp_path / "whole"
    for folder in (whole, run):
        tiny.stage("ppo", inputs, folder, *settings, "rollouts=3").execute()
    shutil.rmtree(run / "ppo" / "checkpoints" / "step-00000012")
    (run / "ppo" / "done.json").unlink()
    tiny.stage("ppo", inputs, run, *settings, "rollouts=3").execute()
    states, costs = [], []
    for folder in (whole, run):
        manifest = folder / "ppo" / "checkpoints" / "step-00000012" / "manifest.json"
        states.append(json.loads(manifest.read_text())["progress"]["state"])
        costs.append([row["kl/coefficient"] for row in tiny.rows(folder, "ppo") if "kl/coefficient" in row])
    assert states[0] == states[1]
    assert states[0]["prompts"] == states[0]["reward/count"] == 96
    assert costs[0] == costs[1]
    assert costs[0][0] == 0.05 > costs[0][1]  # the first rollout is at distance 0, nearer than it may be
    assert costs[0][1] != costs[0][2]


def test_a_loss_that_is_not_of_the_answers_probabilities_is_told_before_the_first_step(
    inputs: Path, run: Path
):
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS)
    state = tiny.running(task)
    for block in state.engines["model"].module.blocks:
        block.dropout = 0.2  # only in training: scored without, lost with it
    with pytest.raises(ValueError, match="ratio of new to old probabilities is off by"):
        next(task.batches(state))


def test_a_rollout_is_not_waited_for_when_asked_to_stop(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    calls, ended = [], []

    def asked(*arguments):
        calls.append(arguments)
        for written in write(*arguments):
            if written.last and len(calls) == 2:
                ended.append(written.request)
                if len(ended) == 1:  # of the second rollout the first of its 32 answers
                    os.kill(os.getpid(), signal.SIGUSR1)
            yield written

    monkeypatch.setattr(rollout, "write", asked)
    settings = [*tiny.ROLLOUTS, "rollouts=3", "at_once=8", "validation_prompts=0", "checkpoint_interval=100"]
    tiny.stage("ppo", inputs, run, *settings).execute()
    assert (len(calls), len(ended)) == (2, 8)
    assert [path.name for path in (run / "ppo" / "checkpoints").glob("step-*")] == ["step-00000004"]
    tiny.stage("ppo", inputs, run, *settings).execute()
    assert [row["step"] for row in tiny.rows(run, "ppo")] == list(range(1, 13))


def test_a_stop_before_the_sample_of_a_validation_is_answered_too(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    def measure(*_) -> dict[str, float]:
        if not (run / "ppo" / "saved.json").exists():
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"reward": 1.0}

    monkeypatch.setattr(PPO, "measure", measure)
    settings = [*tiny.ROLLOUTS, "rollouts=1"]
    tiny.stage("ppo", inputs, run, *settings).execute()
    assert not (run / "ppo" / "done.json").exists()
    tiny.stage("ppo", inputs, run, *settings).execute()
    assert (run / "ppo" / "done.json").exists()
    assert tiny.rows(run, "ppo")[-1]["validation/reward"] == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout=33", r"rollout=33 is not a multiple of batch=16"),
        ("max_new_tokens=24", r"max_new_tokens=24 leaves no room for a prompt in context=24"),
    ],
)
def test_settings_that_cannot_work_are_refused(inputs: Path, run: Path, setting: str, message: str):
    with pytest.raises(ConfigError, match=message):
        tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, setting)


def test_a_model_that_writes_is_no_reward_model(inputs: Path, run: Path):
    with pytest.raises(ValueError, match="ppo needs a reward model; `sft` trained one that writes text"):
        tiny.running(tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "reward=sft"))
