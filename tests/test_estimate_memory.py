"""The formula of memory against a real step of a model that is small; `--table` does it for larger ones."""

import pytest

from tools.estimate_memory import TABLE, main, measured, planned

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


def test_settings_that_cannot_be_are_one_message_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model=gpt_9b", "device=H100"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("model: there is no 'gpt_9b'; did you mean 'gpt_7b'?\n")
    with pytest.raises(SystemExit) as stopped:
        main(["model=gpt_7b", "parallel=zero1_tp8", "device=H100", "--ranks", "12"])
    assert stopped.value.code == 1
    assert "parallel.tensor=8 does not divide 12 ranks" in capsys.readouterr().out


def test_a_device_that_is_named_is_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    main(["model=gpt_1b", "parallel=zero2", "parallel.offload=optimizer", "device=H100", "--ranks", "4"])
    said = capsys.readouterr().out
    # 1,107,365,888 weights on 4 ranks, 16 bytes each: master, gradients, two moments.
    assert "  on the host       4.13 GiB\n" in said
    assert "of 73.60 GiB of H100" in said


def test_the_table_spans_zero_ranks_precisions_and_optimizers_from_2_gib_on() -> None:
    jobs = []
    for line in TABLE.values():
        ranks, *settings = line.split()
        _, job = planned(["model=gpt_125m", "micro_batch=1", *settings], int(ranks), 65_536, here=True)
        jobs.append(job)
    assert min(job.memory.peak for job in jobs) > 1.8 * 2**30
    assert {job.parallel.zero for job in jobs} == {0, 1, 2, 3}
    assert {job.parallel.tensor for job in jobs} == {1, 2}
