"""Seconds of a step on a cluster, against sums done by hand."""

from dataclasses import replace

import pytest

from megachat.model.gpt import GPTConfig
from megachat.model.size import flops_per_token
from megachat.parallel.predict import Cluster, efficiency, step, wait
from megachat.parallel.volume import Kind, Layout, Sent, volume

CLUSTER = Cluster(
    peak=1e12, efficiency={8: 0.5}, within=100e9, between=10e9, used=0.5, near=0.0, far=0.0, per_node=8
)
MODEL = GPTConfig(
    dim=8, layers=3, heads=4, kv_heads=4, head_dim=2, hidden=16, context=32, rope_base=1e4,
    moe=None, qk_norm=True, tied=False, norm_eps=1e-6, dropout=0.0,
)  # fmt: skip


def layout(zero: int, data: int, tensor: int = 1, checkpointing: bool = False) -> Layout:
    return Layout(zero, data, tensor, 2, 3, 5, bf16=True, checkpointing=checkpointing)


def gigabyte(kind: Kind, axis: str, ranks: int) -> Sent:
    return Sent("", axis, kind, ranks, 1.0, 10**9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("axis", "ranks", "tensor", "seconds"),
    [
        ("tensor", 8, 8, 2 * 7 / 8 / 50),  # GB / (GB/s): within the node, at half of 100
        ("tensor", 16, 16, 2 * 15 / 16 / 40),  # over two, by the adapters of eight: half of 80
        ("data", 8, 1, 2 * 7 / 8 / 50),
        ("data", 64, 1, 2 * 63 / 64 / 40),
        ("data", 64, 2, 2 * 63 / 64 / 20),  # four of each node, and their adapters
        ("data", 128, 8, 2 * 127 / 128 / 5),  # one of each node
    ],
)
def test_an_all_reduce_moves_at_the_speed_of_the_slowest_link(
    axis: str, ranks: int, tensor: int, seconds: float
) -> None:
    found = wait(gigabyte("all_reduce", axis, ranks), layout(1, ranks, tensor), CLUSTER)
    assert found == pytest.approx(seconds)


def test_a_ring_waits_for_every_hop_and_a_tree_for_its_height() -> None:
    slow = replace(CLUSTER, far=1.0, near=0.01)
    one = layout(1, 64)
    # Eight nodes of eight: 7 hops between them and 8 x 7 within; up and down 3 levels and 2 x 7 within.
    assert wait(Sent("", "data", "all_gather", 64, 1.0, 0), one, slow) == pytest.approx(7 + 0.56)
    assert wait(Sent("", "data", "all_reduce", 64, 1.0, 0), one, slow) == pytest.approx(6 + 0.14)
    assert wait(Sent("", "data", "all_reduce", 64, 5.0, 0), one, slow) == pytest.approx(5 * 6.14)


def test_one_gpu_waits_for_nobody_and_its_mfu_is_its_efficiency() -> None:
    one = step(MODEL, 10, layout(1, 1), CLUSTER)
    assert one.seconds == one.products == 2 * 15 * flops_per_token(MODEL, 10, 5) / 0.5e12
    assert one.mfu == pytest.approx(0.5)


def test_what_is_computed_again_counts_for_time_and_not_for_mfu() -> None:
    plain, again = (step(MODEL, 10, layout(1, 1, checkpointing=yes), CLUSTER) for yes in (False, True))
    head, down = 6 * 10 * 8, 2 * 3 * 16 * 8  # the last product of a block is not needed again
    blocks = flops_per_token(MODEL, 10, 5) - head
    assert again.products / plain.products == pytest.approx((4 / 3 * blocks - down + head) / (blocks + head))
    assert again.mfu == pytest.approx(0.5 * plain.products / again.products)


def test_tensor_ranks_share_the_blocks_and_the_output_layer() -> None:
    two = step(MODEL, 10, layout(1, 1, tensor=2), CLUSTER)
    assert two.products == pytest.approx(2 * 15 * flops_per_token(MODEL, 10, 5) / 2 / 0.5e12)


def test_what_is_hidden_is_waited_for_beyond_the_products() -> None:
    fast = replace(CLUSTER, peak=1.0)  # products take long
    sent = {zero: volume(MODEL, 10, layout(zero, 8)) for zero in (0, 1, 2, 3)}
    seconds = {
        zero: {one.what: wait(one, layout(zero, 8), CLUSTER) for one in sent[zero]} for zero in (0, 1, 2, 3)
    }
    found = {zero: step(MODEL, 10, layout(zero, 8), fast) for zero in (0, 1, 2, 3)}
    assert found[0].data == pytest.approx(seconds[0]["gradients"])
    assert found[1].data == pytest.approx(seconds[1]["gradients"] + seconds[1]["weights"])
    assert found[2].data == pytest.approx(seconds[2]["weights"])
    assert found[2].hidden == pytest.approx(seconds[2]["gradients"])
    assert found[3].data == 0
    # Where products take no time, all of it is waited for.
    slow = step(MODEL, 10, layout(3, 8), replace(CLUSTER, peak=1e30))
    assert slow.data == pytest.approx(sum(seconds[3].values()))


def test_efficiency_lies_between_those_of_the_nearest_widths() -> None:
    listed = replace(CLUSTER, efficiency={100: 0.4, 400: 0.5})
    assert [efficiency(dim, listed) for dim in (10, 100, 200, 400, 9000)] == pytest.approx(
        [0.4, 0.4, 0.45, 0.5, 0.5]
    )
