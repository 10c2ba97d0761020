"""Advice before a run, with numbers by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from megachat.config import compose, decode
from megachat.train import forecast
from megachat.train.forecast import (
    Job,
    check_batch,
    check_disk,
    check_host,
    check_memory,
    check_rate,
    check_tensor,
    check_tokens,
    check_vocabulary,
    device_memory,
    gib,
    short,
    size,
    usual_rate,
    worst,
    worth,
)

GB = 2**30


def job(*overrides: str, **changes: object) -> Job:
    """gpt_1b on eight GPUs in bf16, 1,107,365,888 parameters."""
    task = decode(compose("pretrain", ["model=gpt_1b", *overrides]))
    made = Job(
        task.model, 65_536, task.parallel, task.optimizer, batch=256, micro_batch=4, seq=4096, ranks=8,
        bf16=True, cuda=True,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_day_is_as_long_as_the_operations_take() -> None:
    one = job()
    # 8 devices of 1e15 FLOP/s at a half do 4e15 a second.
    assert one.seconds(10**9, 1e15, 0.5) == pytest.approx(10**9 * one.flops / 4e15)


def test_a_model_that_does_not_fit_names_the_micro_batch_that_does() -> None:
    assert check_memory(job(micro_batch=1), 80 * GB, "H100").level == "ok"
    found = check_memory(job(micro_batch=64), 80 * GB, "H100")
    assert found.level == "problem"
    fits = int(found.remedy.split()[0].partition("=")[2])
    assert check_memory(job(micro_batch=fits), 80 * GB, "H100").level == "ok"


def test_what_is_a_tenth_too_much_may_fit_and_more_does_not() -> None:
    needed = job().memory.peak
    levels = [check_memory(job(), needed * share, "H100").level for share in (1.0, 0.92, 0.9)]
    assert levels == ["ok", "warning", "problem"]


def test_a_vocabulary_that_is_most_of_a_model_is_a_warning() -> None:
    # gpt_3m: 2,205,760 weights in its blocks and norm; 65,536 x 320 are 90 % of all, 4,096 x 320 are 37 %.
    found = check_vocabulary(job("model=gpt_3m"))
    assert (found.level, "90 % of the" in found.text.replace("%", " %")) == ("warning", True)
    assert check_vocabulary(job("model=gpt_3m", vocab=4096)).level == "ok"


def test_a_7b_model_on_a_card_of_24_gb_is_told_to_shard_more() -> None:
    found = check_memory(job("model=gpt_7b", "parallel=zero1"), 24 * GB, "RTX 4090")
    assert found.level == "problem"
    assert "not even micro_batch=1 fits: try parallel=zero2" in found.remedy


def test_a_batch_with_fewer_samples_than_ranks_is_a_problem_and_an_uneven_one_a_warning() -> None:
    assert check_batch(job(batch=7)).level == "problem"
    assert check_batch(job(batch=256)).level == "ok"
    # 33 samples: the first rank has 5, so all make two micro-batches of 4: 33 of 64 places are used.
    found = check_batch(job(batch=33))
    assert (found.level, "wait 48%" in found.text, found.remedy) == (
        "warning",
        True,
        "batch=32 divides evenly",
    )


def test_four_passes_are_free_and_more_are_worth_less() -> None:
    tokens = 20 * job().parameters
    levels = [[found.level for found in check_tokens(job(), tokens, tokens // times)] for times in (1, 4, 10)]
    assert levels == [["ok", "ok"], ["ok", "ok"], ["ok", "warning"]]
    assert worth(4.0, 1.0) == pytest.approx(3.73, abs=0.01)  # 1 + 15.39 (1 - exp(-3 / 15.39))
    assert worth(1e9, 1.0) == pytest.approx(16.39, abs=0.01)  # however often
    assert worth(0.5, 1.0) == 0.5


def test_a_budget_of_another_model_is_noticed() -> None:
    (found,) = check_tokens(job("model=gpt_7b"), 2_500_000_000, None)
    assert (found.level, "0.351 a parameter" in found.text) == ("warning", True)
    assert "142 B" in found.remedy  # 20 x 7.11 B


def test_a_disk_without_room_for_two_checkpoints_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job().checkpoint
    assert one == 12 * 1_107_365_888
    usage = forecast.shutil.disk_usage(tmp_path)
    for free, level in ((3 * one, "ok"), (2 * one, "warning"), (one, "problem")):
        monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert check_disk(job(), tmp_path / "runs" / "new", kept=2).level == level


def test_learning_rates_far_from_gpt_3s_are_noticed() -> None:
    assert usual_rate(13e9) == 1e-4
    assert usual_rate((1.3e9 * 2.7e9) ** 0.5) == pytest.approx((2e-4 * 1.6e-4) ** 0.5)
    assert check_rate(job("optimizer.lr=3e-4")).level == "ok"
    assert check_rate(job("optimizer.lr=3e-2")).level == "warning"
    assert check_rate(job("optimizer=sgd")).level == "ok"


@pytest.mark.parametrize("axis", ["tensor", "expert"])
def test_ranks_that_talk_in_every_layer_belong_on_one_node(axis: str) -> None:
    assert check_tensor(job(), 8) is None
    eight = job().parallel.model_copy(update={axis: 8})
    assert check_tensor(job(parallel=eight, ranks=64), 8) is None
    found = check_tensor(job(parallel=eight, ranks=64), 4)
    assert found is not None
    assert found.level == "warning"
    assert f"parallel.{axis}=8 spans" in found.text
    found = check_tensor(job(parallel=eight, ranks=12), 8)
    assert found is not None
    assert found.level == "problem"
    rows = job().parallel.model_copy(update={"sequence": 8})
    assert job(parallel=rows, ranks=64).data == 8
    assert check_tensor(job(parallel=rows, ranks=64), 8) is None
    found = check_tensor(job(parallel=rows, ranks=12), 8)
    assert found is not None
    assert found.text == "parallel.sequence=8 does not divide 12 ranks"


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("NVIDIA H100 80GB HBM3", 80), ("NVIDIA H100 NVL", 94), ("NVIDIA A100-SXM4-40GB", 40), ("H200", 141)],
)
def test_a_devices_memory_follows_from_its_name(name: str, gigabytes: int) -> None:
    assert device_memory(name) == gigabytes * GB
    assert device_memory("Voodoo 2") is None
    assert device_memory("H1000") is None


def test_the_host_holds_copies_and_what_is_offloaded() -> None:
    count = 1_107_365_888
    copies = f"{gib(12 * count)} a node for a copy that is saved"  # weights and two moments in fp32
    assert check_host(job("parallel=zero2"), 8, None).text == copies
    # Master, gradients and two moments.
    offloaded = f"{gib(16 * count)} a node for what is offloaded, {copies}"
    assert check_host(job("parallel=zero2", "parallel.offload=optimizer"), 8, None).text == offloaded
    assert check_host(job("parallel=zero2"), 8, 12 * GB).level == "problem"


def test_large_numbers_are_short() -> None:
    assert short(2_500_000_000) == "2.5 B"
    assert size(3.2e12) == "3.2 TB"
    assert short(999) == "999"


def test_one_problem_outweighs_all_warnings() -> None:
    found = [check_batch(job(batch=7)), check_batch(job(batch=33))]
    assert worst(found) == "problem"
    assert worst(found[1:]) == "warning"
    assert worst([]) == "ok"
