"""Bytes by formula, against sums done by hand."""

import pytest

from megachat.model.gpt import GPTConfig
from megachat.parallel.volume import Layout, Sent, held, volume

TINY = GPTConfig(
    dim=8, layers=3, heads=4, kv_heads=2, head_dim=2, hidden=16, context=32, rope_base=1e4,
    moe=None, qk_norm=True, tied=False, norm_eps=1e-6, dropout=0.0,
)  # fmt: skip
"""Of 10 words: embedding and head 80 each; a block has 64 + 32 + 32 + 64 + 3 * 128 = 576 and norms of
8 + 8 + 2 + 2; a last norm of 8: 160 + 3 * 596 + 8 = 1,956."""


def layout(
    zero: int,
    data: int = 1,
    tensor: int = 1,
    bf16: bool = True,
    checkpointing: bool = False,
    sequence: int = 1,
) -> Layout:
    """Two micro-batches of three rows of five tokens, or of a rank's five of a row."""
    return Layout(zero, data, tensor, 2, 3, 5 * sequence, bf16, checkpointing, sequence)


def payloads(found: list[Sent]) -> list[tuple[str, str, int]]:
    return [(sent.axis, sent.kind, sent.payload) for sent in found]


def test_an_all_reduce_sends_twice_what_a_gather_sends() -> None:
    assert Sent("", "data", "all_reduce", 4, 1.0, 100).wire == 150
    assert Sent("", "data", "all_gather", 4, 1.0, 100).wire == 75
    assert Sent("", "data", "reduce_scatter", 4, 1.0, 100).wire == 75


def test_a_tensor_rank_holds_its_share_of_every_matrix_and_all_norms() -> None:
    assert held(TINY, 10, 1) == 1956
    assert held(TINY, 10, 2) == 80 + 3 * (288 + 20) + 8
    assert held(TINY, 9, 2) == held(TINY, 10, 2)  # of 5 and 4 words the more


@pytest.mark.parametrize(
    ("zero", "bf16", "expected"),
    [
        (0, True, [("data", "all_reduce", 4 * 1956)]),
        (0, False, [("data", "all_reduce", 4 * 1956)]),
        (1, True, [("data", "all_reduce", 2 * 1956), ("data", "all_gather", 2 * 1956)]),
        (1, False, [("data", "all_reduce", 4 * 1956), ("data", "all_gather", 4 * 1956)]),
        (2, True, [("data", "all_reduce", 2 * 2 * 1956), ("data", "all_gather", 2 * 1956)]),
        # All of it is too small to be given away.
        (3, True, [("data", "reduce_scatter", 2 * 2 * 1956), ("data", "all_gather", 2 * 1956)]),
    ],
)
def test_data_ranks_send_gradients_and_weights(
    zero: int, bf16: bool, expected: list[tuple[str, str, int]]
) -> None:
    assert payloads(volume(TINY, 10, layout(zero, data=4, bf16=bf16))) == expected


def test_zero_3_gathers_weights_twice_in_every_micro_batch_but_for_those_it_keeps() -> None:
    # Of 100,000 words and a hidden size of 65,536: embedding, head, gate, up and down alone are large.
    config = TINY.model_copy(update={"hidden": 65_536})
    large = 2 * 800_000 + 3 * 3 * 524_288
    small = held(config, 100_000, 1) - large
    assert small == 3 * (192 + 20) + 8
    gathered = [
        [
            sent.payload
            for sent in volume(config, 100_000, layout(3, data=4), live)
            if sent.kind == "all_gather"
        ]
        for live in (0, 1_000_000, 10**9)
    ]
    assert gathered == [
        [2 * 2 * 2 * large, 2 * small],
        [2 * 2 * (2 * large - 1_000_000), 2 * small],
        [2 * 2 * large, 2 * small],
    ]


@pytest.mark.parametrize(
    ("zero", "checkpointing", "forward", "backward", "words"),
    [
        (1, False, 2 * 2, 5 * 2, 2 + 2),  # after out and down; before q, k, v, gate and up
        (1, True, 3 * 2, 5 * 2, 2 + 2),  # and after out once more
        (0, False, 2 * 2, 5 * 4, 4 + 2),  # under autocast gradients are fp32, and so is the embedding
    ],
)
def test_tensor_ranks_send_activations_in_every_block_of_every_micro_batch_and_at_both_ends(
    zero: int, checkpointing: bool, forward: int, backward: int, words: int
) -> None:
    states = 2 * (3 * 5 * 8)  # micro-batches * (rows * tokens * dim)
    found = volume(TINY, 10, layout(zero, tensor=2, checkpointing=checkpointing))
    assert payloads(found) == [
        ("tensor", "all_reduce", forward * 3 * states),  # of three blocks
        ("tensor", "all_reduce", backward * 3 * states),
        ("tensor", "all_reduce", words * states),
        ("tensor", "all_gather", 2 * 4 * (3 * 5) * 2),  # in fp32 a number a token, of both ranks
    ]


@pytest.mark.parametrize(
    ("zero", "bf16", "checkpointing", "times", "sizes"),
    [
        (1, True, False, 2, 2 + 2),  # there, and gradients back
        (1, True, True, 3, 2 + 2),
        (1, False, False, 2, 4 + 4),
        (0, True, False, 2, 4 + 2),  # under autocast what is rotated is fp32: queries and keys
    ],
)
def test_ranks_that_share_rows_exchange_heads_in_every_block_and_shard_as_data_ranks_do(
    zero: int, bf16: bool, checkpointing: bool, times: int, sizes: int
) -> None:
    # Queries and what was gathered: 4 heads of 2 numbers; keys and values: 2 heads of 2.
    exchanged = times * 2 * 3 * (3 * 5) * (8 + 4)  # micro-batches * layers * (rows * tokens) * numbers
    found = volume(TINY, 10, layout(zero, bf16=bf16, checkpointing=checkpointing, sequence=2))
    assert payloads(found)[0] == ("sequence", "all_to_all", sizes * exchanged)
    assert [sent for sent in found if sent.axis == "data"] == volume(
        TINY, 10, layout(zero, data=2, bf16=bf16)
    )
    assert found[0].wire == sizes * exchanged / 2


def test_one_rank_sends_nothing() -> None:
    assert volume(TINY, 10, layout(1)) == []


def test_a_step_has_the_tokens_of_all_its_rows() -> None:
    assert (layout(1, data=4, tensor=2).tokens, layout(1, data=4, tensor=2).gpus) == (4 * 2 * 3 * 5, 8)
