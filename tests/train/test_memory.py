"""Memory by formula: against models as they are built, and against sums by hand."""

from dataclasses import replace

import pytest
import torch

from megachat.config import compose, decode
from megachat.model.gpt import GPT
from megachat.train.memory import Memory, Run, largest_micro_batch, memory, moments_of, parameters_per_rank
from tests.model.test_gpt import TINY, VOCAB


def run(*overrides: str, **changes: object) -> Run:
    """One of gpt_1b with a vocabulary of 65,536, in bf16 on eight GPUs."""
    task = decode(compose("pretrain", ["model=gpt_1b", "parallel=zero1", *overrides]))
    made = Run(
        task.model, 65_536, task.parallel, task.optimizer, data=8, micro_batch=1, seq=task.context,
        accumulated=1, bf16=True, cuda=True,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def own(tensor: int) -> int:
    """What a rank holds of the tiny model, counted from the model and its plan."""
    with torch.device("meta"):
        model = GPT(TINY, VOCAB)
    cut = {name.rpartition(".")[2] for name, how in GPT.tensor_plan.items() if how != "replicate-sum"}
    return sum(
        parameter.numel() // (tensor if name.split(".")[-2] in cut else 1)
        for name, parameter in model.named_parameters()
    )


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_tensor_parallel_rank_holds_its_share_of_all_matrices(tensor: int) -> None:
    assert parameters_per_rank(TINY, VOCAB, tensor) == own(tensor)


def test_the_output_layer_of_two_tensor_ranks_takes_half_as_much_memory() -> None:
    # Gradients in fp32 and once more, and a cast copy; of the states, two copies of 4,096 x 2,048 in bf16.
    states = 2 * 2 * 4_096 * 2_048
    two = run().parallel.model_copy(update={"tensor": 2})
    assert memory(run()).head == 10 * 65_536 * 2_048 + states
    assert memory(run(parallel=two)).head == 10 * 32_768 * 2_048 + states


def test_ranks_that_share_rows_shard_as_data_ranks_do_and_have_some_tokens_each() -> None:
    two = run().parallel.model_copy(update={"sequence": 2})
    alone, shared = memory(run()), memory(run(parallel=two, data=4))
    assert shared.lasting == alone.lasting
    assert alone.head - shared.head == 2 * 2 * 2_048 * 2_048  # states and their gradients of half the tokens
    # All but a mask of whole rows: 2 bytes of each pair, in 16 blocks.
    assert 2 * shared.activations - alone.activations == 16 * 2 * 4_096 * 4_096


def test_zero_1_in_bf16_holds_6_bytes_a_weight_and_shards_12() -> None:
    # 1,107,365,888 weights on 8 ranks: a share is 138,420,736.
    needed = memory(run())
    assert needed.weights == 2 * 1_107_365_888
    assert (needed.master, needed.moments) == (4 * 138_420_736, 8 * 138_420_736)
    assert needed.gradients >= 4 * 1_107_365_888  # in fp32, to add micro-batches up
    assert needed.lasting == needed.weights + needed.master + needed.moments


def test_zero_3_shards_all_that_lasts() -> None:
    needed = memory(run("parallel=zero3"))
    assert needed.lasting == (2 + 4 + 8) * 138_420_736
    assert needed.gradients == 4 * 138_420_736


def test_muon_remembers_one_number_less_of_each_weight_in_the_blocks_matrices() -> None:
    # 16 blocks of 2 x 2048 x 2048 (q, out), 2 x 2048 x 512 (k, v) and 3 x 2048 x 8192: 973,078,528 weights.
    for zero, ranks in (("zero0", 1), ("zero3", 8)):
        adamw, muon = (
            memory(run(f"parallel={zero}", f"optimizer={name}")).moments for name in ("adamw", "muon")
        )
        assert adamw - muon == 4 * 973_078_528 // ranks


def test_zero_0_in_bf16_has_fp32_weights_and_no_master_copy() -> None:
    needed = memory(run("parallel=zero0"))
    assert (needed.weights, needed.master, needed.moments) == tuple(
        count * 1_107_365_888 for count in (4, 0, 8)
    )


def test_sgd_remembers_one_number_or_none() -> None:
    assert moments_of(run("optimizer=sgd").optimizer) == 1
    assert moments_of(run("optimizer=sgd", "optimizer.momentum=0").optimizer) == 0
    assert memory(run("optimizer=sgd", "optimizer.momentum=0")).moments == 0


def test_activations_grow_with_the_micro_batch_and_little_with_checkpointing() -> None:
    one, four = memory(run()), memory(run(micro_batch=4))
    assert four.activations == 4 * one.activations
    assert four.lasting == one.lasting
    assert memory(run("parallel.checkpointing=full")).activations < one.activations / 8


def test_the_peak_is_of_the_worst_moment() -> None:
    zeros = dict.fromkeys(Memory.__dataclass_fields__, 0)
    needed = Memory(
        **zeros | {"weights": 2, "gradients": 3, "activations": 1, "head": 1, "step": 5, "start": 9}
    )
    assert (needed.peak, needed.moment) == (10, "step")
    assert replace(needed, activations=6).moment == "forward"
    assert replace(needed, start=11).moment == "start"


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    here = run()
    room = 80 * 2**30
    found = largest_micro_batch(here, room)
    assert memory(replace(here, micro_batch=found)).peak <= room
    assert memory(replace(here, micro_batch=found + 1)).peak > room
    assert largest_micro_batch(here, 2**30) == 0
