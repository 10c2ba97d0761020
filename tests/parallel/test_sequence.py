"""Ranks that share rows: each has its tokens, and all together what one would have."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megachat.config import ConfigError, compose
from megachat.model.cross_entropy import IGNORE
from megachat.model.generate import Sampling, generate
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.parallel.sequence import check_rows
from megachat.run import Stage
from megachat.train.optimizers import AdamW
from tests.parallel.test_tensor import build, example
from tests.spawn import on_ranks
from tests.tiny_model import spread
from tests.tiny_run import pretrain

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=8)


@on_ranks(4)
def test_neighbours_share_rows_and_others_read_others() -> None:
    mesh = start(1, sequence=2)
    assert (mesh.data, mesh.data_rank) == (2, mesh.rank // 2)
    assert (mesh.replicas, mesh.replica_rank, mesh.sequence_rank) == (4, mesh.rank, mesh.rank % 2)
    # Data ranks of one place: 0 and 2, 1 and 3; each counts for its data once.
    assert mesh.sum(float(10**mesh.rank)) == [101.0, 1010.0][mesh.sequence_rank]
    rows = torch.full((1,), float(mesh.rank))
    torch.distributed.all_reduce(rows, group=mesh.sequence_group)
    assert rows.item() == [1.0, 5.0][mesh.data_rank]


@on_ranks(2)
def test_two_ranks_that_share_rows_of_two_documents_learn_and_write_what_one_does() -> None:
    mesh = start(1, sequence=2)
    optimizer = AdamW(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    tokens, labels = example()
    documents = (torch.arange(32) >= 11).long().expand(8, 32).contiguous()
    trained = int((labels != IGNORE).sum())
    plain = build(tied=False)
    steps = optimizer.build(optimizer.groups(plain))
    for group in steps.param_groups:
        group["lr"] = 1e-2
    expected = []
    for _ in range(6):
        loss = plain(tokens, documents, labels=labels) / trained
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        steps.step()
        steps.zero_grad()
        expected.append([loss.item(), norm.item()])
    assert expected[-1][0] < expected[0][0] - 0.5
    logical: dict[str, Tensor] = {}
    found = []
    # The second half goes on in another layout from what the first has saved.
    for zero, checkpointing in ((3, "none"), (1, "selective")):
        model = build(tied=False)
        layout = spread(zero=zero, sequence=2, precision="fp32", checkpointing=checkpointing)
        engine = Engine(model, optimizer.build, optimizer.groups(model), layout, 0.5, mesh)
        if logical:
            engine.load_logical(lambda name, *index, saved=logical: saved[name][index], steps=3)
        for _ in range(3):
            loss = engine(tokens, documents, labels=labels) / trained
            engine.backward(loss, last=True)
            found.append([loss.item(), engine.step(1e-2)])
        logical = {name: value.clone() for name, value in engine.logical()}
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    with engine.inference() as sampled:
        each = [model(tokens, documents, labels=labels, each=True) for model in (sampled, plain)]
        assert_close(*each, rtol=1e-4, atol=1e-4)
        written = [generate(model, [[7, 8, 9]], GREEDY, stop=set()) for model in (sampled, plain)]
        assert written[0] == written[1]


def test_what_cannot_share_rows_names_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        ConfigError, match=r"sequence=4 does not divide model.kv_heads=2; use one of \[1, 2\]"
    ):
        pretrain(Path("unused"), "parallel.sequence=4")
    with pytest.raises(ConfigError, match=r"sequence=3 does not divide the 8 processes of this job"):
        pretrain(Path("unused"), "parallel.sequence=3")
    with pytest.raises(ConfigError, match=r"tensor=2 and sequence=2 do not go together"):
        pretrain(Path("unused"), "parallel.sequence=2", "parallel.tensor=2")
    with pytest.raises(ConfigError, match=r"compile=true and sequence=2 do not go together"):
        pretrain(Path("unused"), "parallel.sequence=2", "parallel.compile=true")
    model = build(tied=True).config
    with pytest.raises(ValueError, match=r"parallel.sequence=2 does not divide context=63; use one of \[1\]"):
        check_rows(model, 2, 63)
    check_rows(model, 2, 64)


@pytest.mark.parametrize("name", ["sft", "rm", "ppo", "dpo", "grpo"])
def test_other_stages_refuse_to_share_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=rf"only pretrain does; use sequence=1 for {name}"):
        Stage.of(compose(name, ["parallel.sequence=2"]))
