"""A vocabulary that tensor ranks share gives the losses, gradients and logits of one that is whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from megachat.model import cross_entropy as module
from megachat.model.cross_entropy import IGNORE
from megachat.model.generate import Sampling, generate
from megachat.model.gpt import GPT, GPTConfig
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.parallel.tensor import cut_vocabulary, part_of, partition_config, whole
from megachat.train.optimizers import AdamW
from tests.spawn import on_ranks
from tests.tiny_model import spread

VOCAB = 301
"""Of which one rank of two has 150 words and the other 151."""


def build(tied: bool) -> GPT:
    sizes: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 48}
    torch.manual_seed(0)
    return GPTConfig(
        **sizes, context=64, rope_base=1e4, qk_norm=True, tied=tied, norm_eps=1e-6, dropout=0.0, moe=None
    ).build(VOCAB)


def example() -> tuple[Tensor, Tensor]:
    """Eight rows of 32 tokens: two chunks of 128; some labels are not trained on."""
    tokens, labels = torch.randint(VOCAB, (2, 8, 32), generator=torch.Generator().manual_seed(1))
    labels[0, 3:7] = IGNORE
    return tokens, labels


def test_parts_are_as_equal_as_they_can_be() -> None:
    assert [part_of(10, rank, 3) for rank in range(3)] == [range(3), range(3, 6), range(6, 10)]
    assert [part_of(6, rank, 2) for rank in range(2)] == [range(3), range(3, 6)]


def test_deepspeed_is_not_told_of_the_vocabulary() -> None:
    plan = {"embed": "vocab", "mlp.*.down": "row"}
    assert partition_config(plan)["layer_specs"] == [
        {"patterns": [r"^mlp\.\d+\.down\.weight$"], "partition_type": "row"}
    ]


@on_ranks(3)
def test_a_tensor_that_ranks_have_unequal_parts_of_is_put_together_along_any_axis() -> None:
    mesh = start(3)
    full = torch.arange(40.0).view(10, 4)
    own = part_of(10, mesh.tensor_rank, 3)
    assert torch.equal(whole(full[own.start : own.stop], 0, 10, mesh.tensor_group, 3), full)
    assert torch.equal(whole(full.T[:, own.start : own.stop], 1, 10, mesh.tensor_group, 3), full.T)
    assert torch.equal(whole(full, None, 10, mesh.tensor_group, 3), full)


@on_ranks(2)
def test_two_ranks_that_share_the_words_find_the_losses_gradients_and_logits_of_one() -> None:
    mesh = start(2)
    module.LOGITS = {"cpu": 1}  # chunks of 128 rows
    for tied in (True, False):
        one, two = build(tied), build(tied)
        cut_vocabulary(two, GPT.tensor_plan, mesh)
        own = part_of(VOCAB, mesh.tensor_rank, 2)
        assert len(two.embed.weight) == len(own) == 150 + mesh.tensor_rank
        tokens, labels = example()
        by_labels = [model(tokens, labels=labels) for model in (one, two)]
        logits = [model(tokens) for model in (one, two)]
        by_logits = [F.cross_entropy(t.flatten(0, 1), labels.flatten(), reduction="sum") for t in logits]
        assert_close(*logits)
        assert_close(by_labels, by_logits[:1] * 2)
        each = [model(tokens, labels=labels, each=True) for model in (one, two)]
        assert_close(*each)
        for losses in (by_labels, by_logits):
            expected = torch.autograd.grad(losses[0], list(one.parameters()))
            found = torch.autograd.grad(losses[1], list(two.parameters()))
            for true, ours in zip(expected, found, strict=True):
                part = true if true.shape == ours.shape else true[own.start : own.stop]
                assert_close(ours, part, rtol=1e-4, atol=1e-5)


@on_ranks(2)
def test_two_ranks_that_share_the_words_learn_and_write_what_one_does() -> None:
    mesh = start(2)
    optimizer = AdamW(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    tokens, labels = example()
    trained = int((labels != IGNORE).sum())
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=8)
    for tied, zeros in ((True, (0,)), (False, (1, 3))):
        plain = build(tied)
        steps = optimizer.build(optimizer.groups(plain))
        for group in steps.param_groups:
            group["lr"] = 1e-2
        expected = []
        for _ in range(5):
            loss = plain(tokens, labels=labels) / trained
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            steps.step()
            steps.zero_grad()
            expected.append([loss.item(), norm.item()])
        written = generate(plain, [[7, 8, 9]], greedy, stop=set())
        assert expected[0][1] > 0.5  # it is clipped
        assert expected[-1][0] < expected[0][0] - 0.5
        for zero in zeros:
            layout = spread(zero=zero, tensor=2, precision="fp32")
            model = build(tied)
            engine = Engine(model, optimizer.build, optimizer.groups(model), layout, 0.5, mesh)
            found = []
            for _ in range(5):
                loss = engine(tokens, labels=labels) / trained
                engine.backward(loss, last=True)
                found.append([loss.item(), engine.step(1e-2)])
            assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
            with engine.inference() as sampled:
                assert generate(sampled, [[7, 8, 9]], greedy, stop=set()) == written


@on_ranks(2)
def test_fewer_words_than_ranks_are_refused() -> None:
    mesh = start(2)
    model = GPT(build(True).config, 1)
    with pytest.raises(ValueError, match=r"parallel.tensor=2 ranks cannot share a vocabulary of 1"):
        cut_vocabulary(model, GPT.tensor_plan, mesh)
