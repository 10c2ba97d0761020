"""A model that DeepSpeed trained goes on with us as it would have gone on there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import zeros

from megachat.config import ConfigError, compose
from megachat.parallel import checkpoint
from megachat.parallel.deepspeed_checkpoint import Source
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.run import Stage, finished, perform
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.import_deepspeed import ImportDeepSpeed, matched
from megachat.train.optimizers import AdamW
from tests.spawn import on_ranks
from tests.tiny_deepspeed import TINY, convert, deepspeed_engine, loss_of, save, train
from tests.tiny_model import spread
from tests.tiny_run import make, pretrain, rows

MODEL = [f"model.{name}={value}" for name, value in TINY.model_dump().items() if value is not None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer and token shards."""
    return make(tmp_path_factory.mktemp("import") / "runs" / "tiny")


def importing(run: Path, inputs: Path, *overrides: str) -> Stage:
    """The stage."""
    return Stage.of(
        compose(
            "import_deepspeed", [f"run={run}", f"inputs={inputs}", *MODEL, "log.wandb=disabled", *overrides]
        )
    )


def carried_on(run: Path, vocab: int, zero: int, steps: range) -> list[float]:
    """The losses of our engine after what was imported, at another ZeRO stage."""
    mesh = start(1)
    model = TINY.build(vocab)
    settings = AdamW(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    parallel = spread(zero=zero, precision="fp32")
    engine = Engine(model, settings.build, settings.groups(model), parallel, 0.0, mesh)
    saved = checkpoint.newest(run / "pretrain" / "checkpoints", mesh)
    assert saved is not None
    assert saved.manifest["progress"]["step"] == steps.start
    engine.load_logical(saved.reader("model"), saved.manifest["optimizer_steps"]["model"])
    losses = []
    for step in steps:
        loss = loss_of(engine, step, mesh.data_rank)
        engine.backward(loss / mesh.data, last=True)
        engine.step(1e-2)
        losses.append(loss.item())
    return losses


def compare(tmp_path: Path, tiny: Path, zero: int) -> None:
    """Three steps of DeepSpeed's; then its own next three, and ours after an import."""
    mesh = start(1)
    vocab = Tokenizer.load(tiny / "tokenizer").vocab
    # Every parameter cut, however small.
    settings = {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})
    engine = deepspeed_engine({"zero_optimization": settings}, vocab)
    train(engine, range(3), mesh.data_rank)
    save(engine, tmp_path / "own")
    expected = torch.tensor(train(engine, range(3, 6), mesh.data_rank))
    for kind in ("own", "universal") if zero else ("own",):
        run = tmp_path / "runs" / kind
        if mesh.rank == 0:
            if kind == "universal":
                convert(tmp_path / "own")
            perform(importing(run, tiny, f"path={tmp_path / kind}"))
        mesh.barrier()
        found = torch.tensor(carried_on(run, vocab, (zero + 1) % 4, range(3, 6)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1)
def test_the_next_losses_are_deepspeeds_own(tmp_path: Path, tiny: Path, zero: int) -> None:
    compare(tmp_path, tiny, zero)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(2)
def test_the_next_losses_are_those_of_two_ranks_of_deepspeed(tmp_path: Path, tiny: Path, zero: int) -> None:
    compare(tmp_path, tiny, zero)


@pytest.mark.slow
@on_ranks(1)
def test_pretrain_goes_on_from_an_import_and_chat_finds_a_finished_stage(tmp_path: Path, tiny: Path) -> None:
    start(1)
    run = tmp_path / "runs" / "mine"
    engine = deepspeed_engine({"zero_optimization": {"stage": 1}}, Tokenizer.load(tiny / "tokenizer").vocab)
    train(engine, range(5), 0)
    save(engine, tmp_path / "theirs")
    theirs = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    stage = importing(run, tiny, f"path={tmp_path / 'theirs'}")
    perform(stage)
    written = (run / "pretrain" / "done.json").read_text()
    perform(stage)  # nothing has changed since, so nothing is done
    assert (run / "pretrain" / "done.json").read_text() == written

    loaded = checkpoint.load_model(run / "pretrain")
    assert loaded.step == 5
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name

    task = pretrain(run, f"inputs={tiny}", *MODEL, "context=16", "tokens=1024", "resume=any")
    perform(task)
    assert [row["step"] for row in rows(run)] == [6, 7, 8]
    assert (
        rows(run)[0]["samples" if "samples" in rows(run)[0] else "tokens"] == 8 * 16
    )  # the data from their start
    assert finished(run / "pretrain")["fingerprint"] == task.fingerprint()


@pytest.mark.slow
@on_ranks(1)
def test_without_moments_training_goes_on_with_fresh_ones(tmp_path: Path, tiny: Path) -> None:
    start(1)
    run = tmp_path / "runs" / "mine"
    engine = deepspeed_engine({"zero_optimization": {"stage": 2}}, Tokenizer.load(tiny / "tokenizer").vocab)
    train(engine, range(2), 0)
    save(engine, tmp_path / "theirs")
    perform(importing(run, tiny, f"path={tmp_path / 'theirs'}", "moments=false"))
    saved = checkpoint.latest(run / "pretrain")
    assert saved.manifest["optimizer_steps"] == {"model": 0}  # Adam's corrections begin again
    read = saved.reader("model")
    assert read("weight.embed.weight").count_nonzero() > 0
    assert read("exp_avg_sq.embed.weight").count_nonzero() == 0


def source(*names: str, shared: dict[str, str] | None = None) -> Source:
    """A checkpoint of these parameters."""
    parameters = {name: lambda kind: [zeros(1)] for name in names}
    return Source(Path("theirs"), 1, 1, (), parameters, frozenset(), shared or {})


def test_prefixes_are_renamed_one_pattern_after_the_other() -> None:
    theirs = source("module.h.0.w", "module.h.1.w", "module.norm")
    rename = [(r"^module\.", ""), (r"^h\.(\d+)", r"blocks.\1")]
    found = matched(theirs, ["norm", "blocks.0.w", "blocks.1.w"], rename, [])
    assert found == {"norm": "module.norm", "blocks.0.w": "module.h.0.w", "blocks.1.w": "module.h.1.w"}


@pytest.mark.parametrize(
    ("theirs", "rename", "message"),
    [
        (source("a"), [], r"theirs lacks b of this model"),
        (source("a", "m.b"), [], r"theirs lacks b of this model, and has m\.b; rename=\.\.\. can say"),
        (source("a", "b", "c", "d"), [], r"theirs has c, d, for which this model has no place; .*ignore="),
        (source("a", "b", "m.b"), [(r"^m\.", "")], r"b and m\.b would both be b; change rename"),
    ],
)
def test_names_that_do_not_match_are_told(theirs: Source, rename: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matched(theirs, ["a", "b"], rename, [])


def test_a_tied_head_is_left_out_or_stands_in() -> None:
    theirs = source("embed", shared={"head": "embed"})
    assert matched(theirs, ["embed"], [], []) == {"embed": "embed"}
    assert matched(theirs, ["embed", "head"], [], []) == {"embed": "embed", "head": "embed"}


def test_what_is_ignored_has_no_place_and_needs_none() -> None:
    assert matched(source("a", "extra.1", "extra.2"), ["a"], [], ["^extra"]) == {"a": "a"}


def test_patterns_come_through_the_command_line(tmp_path: Path) -> None:
    stage = importing(tmp_path, tmp_path, r'rename=[["^module\.", ""]]', "ignore=[rotary]")
    assert isinstance(stage, ImportDeepSpeed)
    assert stage.rename == [(r"^module\.", "")]
    assert stage.ignore == ["rotary"]
    with pytest.raises(ConfigError, match="is no regular expression"):
        importing(tmp_path, tmp_path, "ignore=['a(']")


def test_no_path_and_a_run_in_the_middle_of_training_are_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"path=\.\.\. is to name the folder"):
        perform(importing(tmp_path / "run", tiny))
    (tmp_path / "run" / "pretrain" / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"step-00000003 is of a training that has not finished; give another run"
    ):
        perform(importing(tmp_path / "run", tiny, f"path={tmp_path}"))
