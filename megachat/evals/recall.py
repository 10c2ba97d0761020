"""Recall: how often an answer is the true sentence, to the letter.

Space at either end does not count; everything else does, the final period included.
"""

from collections.abc import Sequence

from megachat.evals.score import Score, mean


def exact(answer: str, truth: str) -> bool:
    """Whether the answer is the true sentence."""
    return answer.strip() == truth.strip()


def recall(answers: Sequence[str], truths: Sequence[str], seed: int = 0) -> Score:
    """The share of answers that are exactly their true sentence."""
    return mean([float(exact(answer, truth)) for answer, truth in zip(answers, truths, strict=True)], seed)
