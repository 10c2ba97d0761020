"""The formula of memory against a real step of a model that is small; `--table` does it for larger ones."""

import pytest

from tools.estimate_memory import TABLE, measured, planned

SMALL = [
    "model=gpt_3m",
    "parallel=zero0",
    "parallel.precision=fp32",
    "context=64",
    "batch=2",
    "micro_batch=1",
]


@pytest.mark.slow
def test_two_real_steps_take_the_memory_that_the_formula_says() -> None:
    # 131,072 words: 44 M weights, 0.7 GiB with gradients and moments, and 0.3 of the output layer's.
    _, job = planned(SMALL, 1, 131_072, here=True)
    assert job.memory.moment == "forward"
    assert job.memory.peak == pytest.approx(measured(SMALL, 1, 131_072), rel=0.2)


def test_the_table_spans_zero_ranks_precisions_and_optimizers_from_2_gib_on() -> None:
    jobs = []
    for line in TABLE.values():
        ranks, *settings = line.split()
        _, job = planned(["model=gpt_125m", "micro_batch=1", *settings], int(ranks), 65_536, here=True)
        jobs.append(job)
    assert min(job.memory.peak for job in jobs) > 1.8 * 2**30
    assert {job.parallel.zero for job in jobs} == {0, 1, 2, 3}
    assert {job.parallel.tensor for job in jobs} == {1, 2}
