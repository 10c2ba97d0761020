"""Memory by formula: against models as they are built, and against sums by hand."""

from dataclasses import replace

import pytest
import torch

from megachat.config import compose, decode
from megachat.model.gpt import GPT
from megachat.train.memory import (
    Memory,
    Run,
    block_bytes,
    largest_micro_batch,
    memory,
    moments_of,
    parameters_per_rank,
)
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


def test_the_output_layer_of_two_tensor_ranks_has_half_the_gradient_and_as_many_logits_at_once() -> None:
    # The gradient in fp32, 2**27 logits in bf16, in fp32, and their logarithms; the states' in bf16.
    two = run().parallel.model_copy(update={"tensor": 2})
    rest = 10 * 2**27 + 2 * 4_096 * 2_048
    assert memory(run()).head == 4 * 65_536 * 2_048 + rest
    assert memory(run(parallel=two)).head == 4 * 32_768 * 2_048 + rest


def test_ranks_that_share_rows_shard_as_data_ranks_do_and_have_some_tokens_each() -> None:
    two = run().parallel.model_copy(update={"sequence": 2})
    alone, shared = memory(run()), memory(run(parallel=two, data=4))
    assert shared.lasting == alone.lasting
    assert alone.head - shared.head == 2 * 2_048 * 2_048  # the gradient of the states of half the tokens
    assert 2 * shared.activations == alone.activations


def test_expert_parallel_ranks_share_the_experts_and_hold_all_else() -> None:
    # 16 blocks of 64 experts of 3 x 2048 x 1024; of 8 ranks one holds 8 experts a block.
    whole = run("model=gpt_moe_7b")
    spread = replace(whole, parallel=whole.parallel.model_copy(update={"expert": 8}))
    alone, shared = memory(whole), memory(spread)
    assert alone.weights - shared.weights == 2 * 16 * 56 * 3 * 2048 * 1024
    # Their moments are sharded already: over 8 ranks, or over the one that holds them.
    assert alone.moments == shared.moments


def test_zero_1_in_bf16_holds_6_bytes_a_weight_and_shards_12() -> None:
    # 1,107,365,888 weights on 8 ranks: a share is 138,420,736.
    needed = memory(run())
    assert needed.weights == 2 * 1_107_365_888
    assert (needed.master, needed.moments) == (4 * 138_420_736, 8 * 138_420_736)
    assert needed.gradients >= 4 * 1_107_365_888  # in fp32, to add micro-batches up
    assert needed.lasting == needed.weights + needed.master + needed.moments


def test_zero_3_shards_all_that_lasts_and_keeps_a_bucket() -> None:
    needed = memory(run("parallel=zero3"))
    assert needed.lasting == (2 + 4 + 8) * 138_420_736
    assert needed.gradients == 4 * 138_420_736
    assert needed.bucket == 2 * 500_000_000
    assert memory(run("parallel=zero3", "parallel.bucket=1000")).bucket == 2000
    assert needed.gathered == 2 * 1_000_000_000  # DeepSpeed's limit, of 1,107,365,888
    assert memory(run("parallel=zero3", data=1)).gathered == 0


def test_a_rank_alone_on_a_cpu_holds_at_the_end_of_a_backward_pass_what_deepspeed_copies() -> None:
    # 3,524,416 weights, of which 1,310,720 are the embedding: all less than a bucket.
    weights, embedding = 3_524_416, 4096 * 320
    held = {
        ("zero0", False): 4 + 4,  # gradients, and flat
        ("zero1", False): 4 + 4,  # in the bucket, and flat
        ("zero2", False): 4 + 4 + 4,  # of the micro-batches before, in the bucket, and flat
        ("zero3", False): 4 + 4 + 4,  # its share, the bucket in one order and, for gloo, again
        ("zero1", True): 4 + 2 + 4 + 2,  # added up and of the pass, and both flat
        ("zero3", True): 4 + 2 + 4,  # its share, the bucket in one order, and in fp32
    }
    for (layout, bf16), count in held.items():
        here = run(
            "model=gpt_3m", f"parallel={layout}", vocab=4096, data=1, accumulated=2, bf16=bf16, cuda=False
        )
        assert memory(here).reduction == count * weights
    here = run("model=gpt_3m", "parallel=zero2", vocab=4096, data=1, accumulated=2, cuda=False)
    assert memory(here).reduction == (4 + 2 + 2) * weights + 4 * embedding  # the largest slice, made fp32


def test_gradients_of_earlier_micro_batches_are_there_in_a_forward_pass() -> None:
    for layout, share in (("zero0", 1), ("zero2", 8)):
        assert memory(run(f"parallel={layout}", accumulated=1)).gradients == 0
        assert memory(run(f"parallel={layout}", accumulated=2)).gradients == 4 * 1_107_365_888 // share
    assert [memory(run(accumulated=count)).gradients // 1_107_365_888 for count in (1, 2)] == [4, 6]


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    near, away = memory(run("parallel=zero3")), memory(run("parallel=zero3", "parallel.offload=parameters"))
    assert (away.lasting, away.gradients, away.step) == (0, 0, 0)
    assert near.reduction - away.reduction == 4 * 138_420_736
    optimizer = memory(run("parallel=zero3", "parallel.offload=optimizer"))
    assert optimizer.lasting == near.weights
    on_a_cpu = run("parallel=zero3", "parallel.offload=parameters", cuda=False)
    assert memory(on_a_cpu).lasting == near.lasting


def test_selective_checkpointing_remembers_inputs_and_products() -> None:
    # A token of a CPU's block: its input, q, k, v, out, gate, up, down, 2 bytes each number.
    here = run("model=gpt_3m", "parallel.checkpointing=selective", vocab=4096, seq=512, cuda=False)
    products = 2 * (320 + 256 + 2 * 128 + 320 + 2 * 896 + 320)
    ends = 8 * 320 + 512  # of the last norm, and the mask
    assert memory(here).activations == 512 * (2 * products + ends)


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
    needed = Memory(**zeros | {"weights": 2, "bucket": 1, "gradients": 3, "head": 1, "step": 5, "start": 7})
    assert (needed.peak, needed.moment) == (8, "step")
    assert replace(needed, reduction=6).moment == "reduction"
    assert replace(needed, activations=6).moment == "forward"
    assert replace(needed, start=9).moment == "start"


def test_only_a_model_that_is_cut_before_zero_3_shards_it_is_whole_at_the_start() -> None:
    assert memory(run("parallel=zero3")).start == 0
    both = replace(
        run("parallel=zero3", data=4),
        parallel=run("parallel=zero3").parallel.model_copy(update={"tensor": 2}),
    )
    held = parameters_per_rank(both.model, both.vocab, 2)
    assert memory(both).start == 2 * held + 4 * -(-held // 4)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    here = run()
    room = 80 * 2**30
    found = largest_micro_batch(here, room)
    assert memory(replace(here, micro_batch=found)).peak <= room
    assert memory(replace(here, micro_batch=found + 1)).peak > room
    assert largest_micro_batch(here, 2**30) == 0


def saved(model: GPT, seq: int, autocast: bool) -> int:
    """Bytes that autograd holds after a forward pass of one row, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(1, seq, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.hidden(tokens, tokens)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("seq", [192, 1024])  # with 64 numbers in a head, shares of up to 512 tokens are kept
def test_a_block_leaves_as_many_bytes_as_autograd_holds(how: str, seq: int) -> None:
    shape = ["dim=256", "hidden=704", "heads=8", "kv_heads=2", "head_dim=64", "qk_norm=true"]
    layout = f"parallel=zero{int(how != 'autocast')}"
    here = run(layout, *(f"model.{size}" for size in shape), seq=seq, bf16=how != "fp32", cuda=False)
    held = []
    for layers in (1, 2):
        model = here.model.model_copy(update={"layers": layers}).build(8)
        model = model.bfloat16() if how == "bf16" else model
        weights = 2 * sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) * here.autocast
        held.append(saved(model, seq, here.autocast) - weights)
    # Left out are the roots of mean squares: 4 bytes for each norm of a token, and of each of its heads.
    assert held[1] - held[0] == seq * (block_bytes(here) + 4 * (2 + 8 + 2))
