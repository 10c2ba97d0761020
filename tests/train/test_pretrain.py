"""Pretraining on its own: what is measured does not depend on how many ranks measure it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megachat.config import compose
from megachat.data.document import Document, read_documents, write_documents
from megachat.data.loader import Window
from megachat.model.gpt import GPTConfig
from megachat.model.size import Work
from megachat.parallel.mesh import Mesh
from megachat.run import Stage, perform
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train import forecast
from megachat.train.loop import Progress, Running
from megachat.train.pretrain import Pretrain, collate
from tests.spawn import on_ranks
from tests.tiny_model import finish
from tests.tiny_run import make, pretrain, rows

THREE = ["tokens=512", "validation_windows=3"]
"""Two steps, then three windows to measure, which two ranks cannot share evenly."""


@on_ranks(1)
def by_one(run: Path) -> None:
    perform(pretrain(run, *THREE))


@on_ranks(2)
def by_two(run: Path, inputs: Path, zero: int) -> None:
    perform(pretrain(run, *THREE, f"inputs={inputs}", f"parallel=zero{zero}", "micro_batch=1"))


@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_validate_on_the_windows_of_one(tmp_path: Path, zero: int) -> None:
    one, two = make(tmp_path / "runs" / "one"), tmp_path / "runs" / "two"
    by_one(run=one)
    by_two(run=two, inputs=one, zero=zero)
    alone, shared = (rows(run)[-1]["validation/bits_per_byte"] for run in (one, two))
    assert shared == pytest.approx(alone, rel=1e-5)


def encoded(run: Path, inputs: Path, more: int = 0) -> Path:
    """A finished `encode` of the sources `a` and `b`, of which there may be more copies of `b`."""
    shutil.copytree(inputs / "tokenizer", run / "tokenizer")
    documents = list(read_documents(inputs / "clean"))
    some = [Document(one.id, one.text, "ab"[number % 2]) for number, one in enumerate(documents)]
    again = [Document(f"{one.id}-{copy}", one.text, "b") for copy in range(more) for one in documents[:20]]
    write_documents(run / "clean", [*some, *again], per_shard=50)
    finish(run / "clean")
    perform(Stage.of(compose("encode", [f"run={run}", "validation=0.1", "executor.processes=1"])))
    return run


@on_ranks(1)
def mixed(run: Path, overrides: list[str]) -> None:
    phases = "[{tokens: 512, weights: {a: 3, b: 1}}, {tokens: null, weights: {b: 1}}]"
    settings = ["mixture=curriculum", f"mixture.phases={phases}", "tokens=1024", "schedule=constant"]
    perform(pretrain(run, *settings, "schedule.warmup=0", "resume=any", *overrides))


@pytest.mark.slow
def test_a_mixture_is_read_alike_in_one_go_and_in_parts_and_changed_data_is_refused(tmp_path: Path) -> None:
    inputs = encoded(tmp_path / "runs" / "data", make(tmp_path / "runs" / "made"))
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    mixed(run=whole, overrides=[f"inputs={inputs}"])
    for steps, ahead in ((1, 0), (3, 2), (4, 1)):
        mixed(run=parts, overrides=[f"inputs={inputs}", f"max_steps={steps}", f"prefetch={ahead}"])
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]
    assert len(rows(parts)) == 4
    more = encoded(tmp_path / "runs" / "more", tmp_path / "runs" / "made", more=2)
    longer = [f"inputs={more}", "max_steps=6", "tokens=1536"]
    with pytest.raises(pytest.fail.Exception, match="b has changed; go on with on_changed_data=extend"):
        mixed(run=parts, overrides=longer)
    mixed(run=parts, overrides=[*longer, "on_changed_data=extend"])
    assert [row["step"] for row in rows(parts)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_packed_rows_train_and_padding_has_no_label(tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "packed")
    packed(run=run)
    losses = [row["loss"] for row in rows(run)]
    assert losses[-1] < losses[0]
    batch = collate(
        [Window(np.array([5, 6, 7, 0, 0]), [0, 3]), Window(np.array([5, 6, 7, 8, 9]), [0, 1, 4, 5])]
    )
    assert batch.labels.tolist() == [[6, 7, -100, -100], [-100, 7, 8, -100]]
    assert batch.documents.tolist() == [[0, 0, 0, -1], [0, 1, 1, 1]]
    assert batch.weight == 4


@on_ranks(1)
def packed(run: Path) -> None:
    perform(pretrain(run, "packing=best_fit"))


@on_ranks(1)
def refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"encode was encoded with another tokenizer"):
        perform(pretrain(run))


def test_shards_of_another_tokenizer_are_refused(run: Path) -> None:
    make(run)
    perform(Stage.of(compose("tokenizer", [f"run={run}", "vocab=301", "threads=1", "log.wandb=disabled"])))
    refused(run=run)


def test_the_work_of_a_row_is_that_of_its_documents_without_padding() -> None:
    row = Window(np.arange(9), [0, 3, 7])  # 9 tokens, the last of them only a label; two are padding
    work = collate([row, Window(np.arange(9), [0, 9])]).work
    # Documents of 3, 4 and 8 tokens; no label comes from another document, or from padding.
    assert work == Work(tokens=3 + 4 + 8, pairs=6 + 10 + 36, logits=2 + 3 + 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("foresee") / "runs" / "made")


def foresee(run: Path, *overrides: str) -> None:
    """What a run of one rank is told before it loads anything."""
    task = pretrain(run, *overrides)
    assert isinstance(task, Pretrain)
    tokenizer = Tokenizer.load(task.input("tokenizer"))
    task.foresee(Running(Mesh(0, 1, 1, torch.device("cpu"), None, None), tokenizer, Progress()))


def test_a_model_that_memory_cannot_hold_is_refused_with_the_remedy(made: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)GiB a rank.* micro_batch=1 fits: try .*preflight=false"):
        foresee(made, "model.layers=2000", "model.hidden=1048576")


@on_ranks(1)
def on_a_small_machine(run: Path, inputs: Path, preflight: bool) -> None:
    forecast.memory_here = lambda: 2**20
    build = GPTConfig.build

    def fails(*_: object) -> None:
        raise AssertionError("the model was built")

    GPTConfig.build = fails if preflight else build  # type: ignore[assignment,method-assign]
    try:
        perform(pretrain(run, f"inputs={inputs}", "max_steps=1", f"preflight={preflight}"))
    except ValueError as error:
        assert "of the memory that is free here" in str(error)  # noqa: PT017
        assert preflight
        return
    assert not preflight


def test_it_is_refused_before_it_is_built_and_regardless_without_preflight(
    made: Path, tmp_path: Path
) -> None:
    for preflight in (True, False):
        on_a_small_machine(run=tmp_path / str(preflight), inputs=made, preflight=preflight)
    assert rows(tmp_path / "False")[-1]["step"] == 1


def test_text_that_is_read_too_often_is_a_warning_and_other_words_end_the_run(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foresee(made)
    assert "WARNING" not in capsys.readouterr().err
    foresee(made, "tokens=3000000")
    assert "pretrain: WARNING: corpus: " in capsys.readouterr().err
    other = tmp_path / "runs" / "other"
    shutil.copytree(made, other)
    perform(Stage.of(compose("tokenizer", [f"run={other}", "vocab=301", "threads=1", "log.wandb=disabled"])))
    with pytest.raises(
        ValueError, match=r"was encoded with another tokenizer .* are no words of the model's 301"
    ):
        foresee(other)
