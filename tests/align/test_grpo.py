"""The GRPO family: what each variant's settings do, by hand, and that it learns."""

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.grpo import GRPO, Chosen, Variant
from megachat.align.rewards import Answer, Exact
from megachat.align.rows import Rows
from megachat.config import ConfigError, compose
from megachat.model.size import NOTHING
from megachat.run import Stage
from megachat.train.loop import Running, train_step
from tests.align import tiny

VARIANTS = ["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo"]


def made(inputs: Path, run: Path, *overrides: str) -> GRPO:
    task = tiny.stage("grpo", inputs, run, *tiny.ROLLOUTS, *tiny.GROUPS, *overrides)
    assert isinstance(task, GRPO)
    return task


@cache
def variant(name: str, *overrides: str) -> Variant:
    decoded = Stage.of(compose("grpo", [f"variant={name}", *overrides]))
    assert isinstance(decoded, GRPO)
    return decoded.variant


@contextmanager
def letters_score(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reward with degrees: the share of `abab` and its stop that is in its place."""

    def scores(self: Exact, answers: Sequence[Answer]) -> list[float]:
        found = []
        for answer in answers:
            truth = answer.prompt.answer
            right = sum(a == b for a, b in zip(answer.text.strip(), truth, strict=False))
            found.append((right + (answer.stopped and len(answer.text.strip()) == len(truth))) / 5)
        return found

    monkeypatch.setattr(Exact, "scores", scores)
    yield


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("grpo", [0.5 / (1 / 3) ** 0.5, -0.5 / (1 / 3) ** 0.5]),
        ("dr_grpo", [0.5, -0.5]),
        ("rloo", [2 / 3, -2 / 3]),
        ("reinforce_pp", [1.0, -1.0]),  # whitened over all four tokens
    ],
)
def test_the_advantage_of_right_and_wrong_in_each_variant(name: str, better: list[float]):
    scores, mask = tensor([1.0, 0.0, 1.0, 0.0]), torch.ones(4, 1).bool()
    found = variant(name).advantages(scores, torch.zeros(4, 1), mask, size=4)
    assert_close(found, tensor([[better[0]], [better[1]]] * 2), rtol=1e-5, atol=1e-6)


def test_the_distance_to_the_reference_costs_the_same_whatever_the_spread_of_the_scores():
    kl = ["variant.kl=0.1"]
    drift = tensor([[1.0, 1.0], [0.0, 0.0]])  # 2 nats, and none: the mean is 1
    mask = torch.ones(2, 2).bool()
    for gap in (1.0, 1e-3):
        found = variant("grpo", *kl).advantages(tensor([gap, 0.0]), drift, mask, size=2)
        alone = variant("grpo", "variant.kl=0").advantages(tensor([gap, 0.0]), drift, mask, size=2)
        assert_close(found - alone, tensor([[-0.1, -0.1], [0.1, 0.1]]), rtol=0, atol=1e-5)
    # Without groups it is paid token by token, to go.
    free = variant("reinforce_pp", *kl, "variant.scale=none").advantages(tensor([1.0, 0.0]), drift, mask, 1)
    assert_close(free, tensor([[0.8, 0.9], [0.0, 0.0]]))


def test_kl_in_the_loss_adds_its_estimate_and_leaves_the_advantages():
    settings = ["variant.kl=0.1", "variant.kl_in=loss", "variant.estimator=k2"]
    chosen, mask = variant("grpo", *settings), tensor([[True], [True]])
    drift, zero = tensor([[2.0], [0.0]]), torch.zeros(2, 1)
    assert_close(chosen.advantages(torch.zeros(2), drift, mask, size=2), zero)
    assert_close(chosen.cost(drift, drift, zero, zero, mask), tensor([[0.2], [0.0]]))  # .1 * 2 squared, by 2


def test_the_family_is_settings_alone():
    names = [name for name in VARIANTS if variant(name).clip_high == 0.28]
    assert names == ["dapo", "cispo"]
    assert variant("gspo").ratio == "answer"
    assert {name: variant(name).mean for name in VARIANTS} == {
        "grpo": "answer", "dr_grpo": "constant", "dapo": "token", "rloo": "constant",
        "reinforce_pp": "token", "gspo": "answer", "cispo": "token",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["variant=rloo", "variant.scale=group"], "scale=group divides by the deviation"),
        (
            ["variant.kl=0.1", "variant.kl_in=loss", "variant.estimator=k1"],
            "estimator=k1 in the loss has a gradient of 0",
        ),
        (["group=1"], "group=1 has nothing to compare"),
        (["group=3"], "rollout=32 is not a multiple of group=3"),
        (["variant.overlong=9"], "overlong=9 is more than max_new_tokens=8"),
        (["variant=reinforce_pp", "variant.refills=1"], "baseline=none has no groups"),
    ],
)
def test_settings_that_cannot_work_are_refused(inputs: Path, run: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        made(inputs, run, *overrides)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_first_step_that_moves_nothing_is_on_policy(
    name: str, inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    with letters_score(monkeypatch):
        task = made(inputs, run, f"variant={name}", "variant.overlong=0", "temperature=0.7")
        state = tiny.running(task)
        batches = task.batches(state)
        for _ in range(task.steps):
            sums = train_step(task, state, next(batches), rate=0.0)
            state.progress.step += 1
            for figure in ("moved", "clip_fraction", "clip_fraction/low", "ratio/variance"):
                assert sums[figure] == 0, figure
            assert sums["gradient_norm"] > 0
    assert state.notes["kl"] == state.notes["kl/k3"] == 0


def test_the_answers_of_a_group_are_all_to_one_prompt(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    def scores(self: Exact, answers: Sequence[Answer]) -> list[float]:
        return [float(ord(answer.prompt.answer[0]) + 10 * ord(answer.prompt.answer[1])) for answer in answers]

    monkeypatch.setattr(Exact, "scores", scores)
    task = made(inputs, run)
    state = tiny.running(task)
    next(task.batches(state))
    assert state.notes["group/flat"] == 1
    assert state.notes["reward/deviation"] > 0


def test_a_loss_that_is_not_of_the_answers_probabilities_is_told_before_the_first_step(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    with letters_score(monkeypatch):
        task = made(inputs, run)
        state = tiny.running(task)
        for block in state.engines["model"].module.blocks:
            block.dropout = 0.2  # only in training: scored without, lost with it
        with pytest.raises(ValueError, match="ratio of new to old probabilities is off by"):
            next(task.batches(state))
        state = tiny.running(task)
        with torch.no_grad():
            for parameter in state.frozen["reference"].parameters():
                parameter.mul_(1.5)
        with pytest.raises(ValueError, match="the KL to the reference is off by"):
            next(task.batches(state))


def test_groups_without_spread_are_counted_and_left_out(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    def scores(self: Exact, answers: Sequence[Answer]) -> list[float]:
        # Of the eight groups of four only the second has spread.
        return [float(4 <= row < 6) for row in range(len(answers))]

    monkeypatch.setattr(Exact, "scores", scores)
    task = made(inputs, run, "variant.kl=0", "epochs=1", "batch=32", "micro_batch=32")
    state = tiny.running(task)
    ((batch,),) = [next(task.batches(state))]
    assert isinstance(batch, Chosen)
    assert state.notes["group/flat"] == 7 / 8
    assert len(batch.rows.tokens) == batch.weight == 4  # a mean over answers: 4 of them
    assert sorted(batch.advantages.amax(-1).sign().tolist()) in ([-1, -1, 1, 1], [0, 0, 1, 1])
    dearer = made(inputs, run, "variant.kl=0.1", "epochs=1", "batch=32", "micro_batch=32")
    ((batch,),) = [next(dearer.batches(tiny.running(dearer)))]
    assert len(batch.rows.tokens) == 32  # where the distance is to be paid all have something to teach


def test_a_batch_that_teaches_nothing_changes_nothing(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Exact, "scores", lambda self, answers: [0.1] * len(answers))
    task = made(inputs, run, "variant.kl=0")
    state = tiny.running(task)
    sums = train_step(task, state, next(task.batches(state)), rate=1e-2)
    assert sums["loss"] == sums["gradient_norm"] == 0


def test_more_prompts_are_asked_in_place_of_those_without_spread(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def scores(self: Exact, answers: Sequence[Answer]) -> list[float]:
        asked.append(len(answers) // 4)
        # Every other group has spread.
        return [float(row % 8 == 0) for row in range(len(answers))]

    monkeypatch.setattr(Exact, "scores", scores)
    task = made(inputs, run, "variant=dapo", "variant.overlong=0", "variant.refills=9")
    state = tiny.running(task)
    next(task.batches(state))
    assert asked == [8, 4, 2, 1]  # 4, 2, 1 and 1 with spread: the first of one is a good one
    assert state.notes["group/flat"] == 0
    assert state.progress.state["prompts"] == 15
    bounded = made(inputs, run, "variant=dapo", "variant.overlong=0", "variant.refills=1")
    state = tiny.running(bounded)
    next(bounded.batches(state))
    assert state.notes["group/flat"] == 2 / 8
    assert state.progress.state["prompts"] == 12


def test_a_reward_that_only_shapes_does_not_make_spread(inputs: Path, run: Path):
    task = made(inputs, run, "rewards=[exact,length]", "rewards.length.longest=2", "rewards.length.weight=1")
    state = tiny.running(task)
    next(task.batches(state))
    # The model knows nothing, so all answers are wrong, and of any length.
    assert state.notes["reward/exact"] == 0
    assert state.notes["reward/length"] < 0
    assert state.notes["group/deviation"] > 0
    assert state.notes["group/flat"] == 1


def test_unfinished_answers_can_be_left_out_of_loss_and_denominator(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    with letters_score(monkeypatch):
        sizes = ["epochs=1", "batch=32", "micro_batch=32", "variant.kl=0.1", "max_new_tokens=14"]
        task = made(inputs, run, *sizes, "variant.unfinished=drop", "temperature=3")
        state = tiny.running(task)
        end = state.tokenizer.end
        ((batch,),) = [next(task.batches(state))]
        assert 0 < len(batch.rows.tokens) < 32
        assert ((batch.rows.labels == end).sum(-1) == 1).all()
        assert state.notes["answer/stopped"] == pytest.approx(len(batch.rows.tokens) / 32)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_of_one_add_up_to_the_batch(
    name: str, inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    with letters_score(monkeypatch):
        settings = [f"variant={name}", "variant.overlong=0", "variant.refills=0", "variant.kl=0.1"]
        settings += ["variant.kl_in=loss", "epochs=1", "batch=32", "micro_batch=32"]
        task = made(inputs, run, *settings)
        state = tiny.running(task)
        ((whole,),) = [next(task.batches(state))]
    old = whole.logps + 0.3 * torch.randn_like(whole.logps)  # some are clipped
    moved = Chosen(whole.weight, NOTHING, 32, whole.rows, old, whole.reference, whole.advantages)

    def one(row: int) -> Chosen:
        at = slice(row, row + 1)
        rows = Rows(whole.rows.tokens[at], whole.rows.labels[at], whole.rows.real[at])
        return Chosen(0.0, NOTHING, 1, rows, old[at], whole.reference[at], whole.advantages[at])

    together, alone = task.loss(state, moved), [task.loss(state, one(row)) for row in range(32)]
    assert_close(sum(part.losses["model"] for part in alone), together.losses["model"], rtol=1e-4, atol=1e-4)
    for figure, value in together.metrics.items():
        assert_close(sum(part.metrics[figure] for part in alone), value, rtol=1e-3, atol=1e-3)
    assert together.metrics["clip_fraction/low"] > 0
    assert together.metrics["clip_fraction/high"] > 0


def test_a_missing_truth_is_told_before_anything_is_sampled(inputs: Path, run: Path, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{a}b?"}) for a in tiny.LETTERS))
    with pytest.raises(
        ValueError, match=r"rewards\.exact compares with the true answer, and a prompt has none"
    ):
        tiny.running(made(inputs, run, f"prompts.path={path}"))


def test_a_reward_model_scores_like_any_other_reward(inputs: Path, run: Path):
    task = tiny.stage(
        "grpo", inputs, run, *tiny.ROLLOUTS, "group=4", "rewards=model", "rewards.model.weight=2"
    )
    state = tiny.running(task)
    next(task.batches(state))
    assert task.reads() == ["tokenizer", "sft", "rm"]
    assert state.notes["reward/mean"] == pytest.approx(2 * state.notes["reward/model"], rel=1e-5)
    assert state.notes["group/deviation"] > 0


def test_a_run_that_was_cut_off_goes_on_to_the_last_bit(
    inputs: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ["rollouts=3", "checkpoint_interval=1", "checkpoint_keep=9", "variant=dapo"]
    settings += ["variant.overlong=0", "variant.refills=2", "variant.kl=0.1"]
    with letters_score(monkeypatch):
        whole = tmp_path / "whole"
        made(inputs, whole, *settings).execute()
        made(inputs, run, *settings).execute()
        shutil.rmtree(run / "grpo" / "checkpoints" / "step-00000012")
        (run / "grpo" / "done.json").unlink()
        made(inputs, run, *settings).execute()
    clocks = {"seconds", "tokens_per_second", "memory_gib"}
    first, second = (
        [
            {
                name: row[name]
                for name in row
                if name not in clocks and not name.startswith(("checkpoint/", "time/", "rollout/"))
            }
            for row in tiny.rows(folder, "grpo")
        ]
        for folder in (whole, run)
    )
    assert len(first) == 12
    assert first == second
    answers = [(folder / "grpo" / "answers.jsonl").read_text() for folder in (whole, run)]
    assert answers[0] == answers[1]
    assert first[8]["kl"] != 0  # in the third rollout: the reference is where it was, the policy is not
    manifests = [
        json.loads((folder / "grpo" / "checkpoints" / "step-00000012" / "manifest.json").read_text())
        for folder in (whole, run)
    ]
    prompts = [one["progress"]["state"]["prompts"] for one in manifests]
    assert prompts[0] == prompts[1] >= 24


def test_what_was_answered_is_recorded_with_what_it_was_worth(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    with letters_score(monkeypatch):
        made(inputs, run, "rollouts=2", "answers_shown=3", "validation_prompts=2").execute()
    answers = [json.loads(line) for line in (run / "grpo" / "answers.jsonl").read_text().splitlines()]
    row = tiny.rows(run, "grpo")[-1]
    rollouts = [one for one in answers if one["of"] == "rollout"]
    assert [one["step"] for one in rollouts] == [1] * 3 + [5] * 3
    assert len({one["prompt"] for one in rollouts[:3]}) == 1  # of one group
    held_out = [one["reward"] for one in answers if one["of"] == "held out"]
    assert sum(held_out) / 2 == pytest.approx(row["validation/reward"])
    for one in answers:
        assert one["truth"] == tiny.answer(one["prompt"])
        assert one["reward"] == one["reward/exact"] * 1.0


def test_a_validation_tells_how_often_one_of_k_answers_is_right(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    def scores(self: Exact, answers: Sequence[Answer]) -> list[float]:
        assert [one.prompt for one in answers[:4]] == [answers[0].prompt] * 4
        # Of four answers to the first prompt one is right, of the second all, of the third none.
        return [float(row == 2 or 4 <= row < 8) for row in range(len(answers))]

    monkeypatch.setattr(Exact, "scores", scores)
    task = made(inputs, run, "validation_samples=4", "validation_prompts=3", "prompts.held_out=0.3")
    state = tiny.running(task)
    figures = task.measure(state)
    assert figures == pytest.approx(
        {
            "reward": 5 / 12, "reward/exact": 5 / 12, "pass@1": (1 / 4 + 1) / 3,
            "pass@2": (1 / 2 + 1) / 3, "pass@4": (1 + 1) / 3,
        }
    )  # fmt: skip
    assert [one["reward"] for one in state.answers] == [0.0, 1.0, 0.0]  # the first to each
    assert len({one["prompt"] for one in state.answers}) == 3


def learnt(half_right: Path, run: Path, seed: int, *overrides: str) -> list[float]:
    """The mean reward of every rollout."""
    settings = ["batch=128", "micro_batch=128", "rollout=128", "at_once=128", "max_new_tokens=6", "group=8"]
    settings += ["epochs=1", f"seed={seed}", "prompts.held_out=0", "rollouts=40"]
    task = made(half_right, run, *settings, *overrides)
    state: Running = tiny.running(task)
    batches: Any = task.batches(state)
    rewards = []
    for _ in range(state.total):
        torch.manual_seed(state.progress.step)
        train_step(task, state, next(batches), rate=2e-3)
        state.progress.step += 1
        rewards.append(state.notes["reward/mean"])
    return rewards


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, secrets.randbelow(2**31)], ids=["fixed", "random"])
def test_it_learns_what_is_rewarded_from_any_seed(
    half_right: Path, run: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    with letters_score(monkeypatch):
        rewards = learnt(half_right, run, seed)
    assert sum(rewards[:3]) / 3 < 0.85
    assert sum(rewards[-10:]) / 10 >= 0.95, (seed, rewards[::5])
