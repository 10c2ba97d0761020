"""Win rates: of two models' answers to one question, whose is closer to the true sentence?

Closer means: exactly the true sentence beats anything that is not; otherwise the higher chrF wins (Popovic,
2015), which counts shared runs of characters and so works for any language. A tie is half a win, so a model
against itself scores 0.5. The judge is the truth, not the reward model: a policy trained against a reward
model learns to please it, which is why wins by reward are computed too but shown apart.
"""

from collections.abc import Sequence

from sacrebleu.metrics import CHRF

from megachat.evals.recall import exact
from megachat.evals.score import Score, mean


def closer(ours: str, theirs: str, truth: str, chrf: CHRF) -> float:
    """1 when our answer is closer to the truth, 0 when theirs is, 0.5 for a tie."""
    right, wrong = exact(ours, truth), exact(theirs, truth)
    if right or wrong or ours.strip() == theirs.strip():
        return 0.5 + (right - wrong) / 2
    return outcome(chrf.sentence_score(ours, [truth]).score, chrf.sentence_score(theirs, [truth]).score)


def outcome(ours: float, theirs: float) -> float:
    """1 when our number is the higher one, 0 when theirs is, 0.5 for a tie."""
    return 0.5 + (float(ours > theirs) - float(ours < theirs)) / 2


def win_rate(ours: Sequence[str], theirs: Sequence[str], truths: Sequence[str], seed: int = 0) -> Score:
    """The share of questions we win, ties counting half."""
    chrf = CHRF()
    return mean([closer(*answers, chrf) for answers in zip(ours, theirs, truths, strict=True)], seed)


def win_rate_by_reward(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Score:
    """The share of questions where our answer has the higher reward, ties counting half."""
    return mean([outcome(*rewards) for rewards in zip(ours, theirs, strict=True)], seed)
