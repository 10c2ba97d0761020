"""The one training loop.

A stage adds where its batches come from and what one costs; everything else is here, in order.

A loss is a sum over the batch and a batch knows its weight (tokens or pairs), so that a step's loss is the
exact mean over all micro-batches of all ranks however unequal they are. Any number of data ranks shares a
batch: all run equally many micro-batches, a rank with fewer samples an idle one that counts nothing.
Randomness is reseeded at each step from (seed, step, rank), so a resumed run draws what the uninterrupted one
would have drawn.
"""

import contextlib
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from megachat.data.loader import places
from megachat.data.shards import first_damaged, written
from megachat.files import sha256
from megachat.log import Recorder, progress, say
from megachat.model.blueprint import Blueprint
from megachat.model.gpt import GPT, Checkpointing
from megachat.model.size import NOTHING, Flops, Work
from megachat.parallel import attempt, checkpoint
from megachat.parallel.engine import Engine, Parallel
from megachat.parallel.mesh import Mesh, be_patient, divisors, expected_world, start
from megachat.parallel.preflight import preflight, read_again
from megachat.parallel.saving import Saver
from megachat.parallel.tensor import check_fits
from megachat.run import Stage, Superseded, begin, differences, finish, record_config
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.guard import Guard, Skipped, Span, Unequal, compare, culprits
from megachat.train.metrics import memory_gib, peak_of_all
from megachat.train.optimizers import Optimizer
from megachat.train.profile import Profile
from megachat.train.schedules import Schedule
from megachat.train.watch import Watch, Watching

T = TypeVar("T")

AGAIN = (2.0, 10.0)
"""Seconds to wait before the last checkpoint is tried once more: no later one makes up for it."""
LOOK = 10.0
"""Seconds between two looks at whether a newer start has taken over, besides the one before each save."""


@dataclass
class Progress:
    """How far a run is: what a checkpoint remembers besides tensors."""

    step: int = 0
    """Optimizer steps taken, those included whose batch was skipped."""
    samples: int = 0
    """Samples read by all ranks together; where the loader goes on."""
    tokens: int = 0
    """Tokens passed through the trained model by all ranks together."""
    seconds: float = 0.0
    """Time spent in this stage, earlier attempts included."""
    validated: int = 0
    """The step of the last validation."""
    data: dict[str, Any] = field(default_factory=dict)
    """What `samples` counts: which data in which order, for stages that can tell when it has changed."""
    skipped: int = 0
    """Steps without an update, for the batch was skipped."""
    recent: list[float] = field(default_factory=list)
    """The losses of the last good steps, with which the guard compares the next."""
    references: dict[str, str] = field(default_factory=dict)
    """The stages whose models the run compares its own with, and the sums that tell those from others."""
    state: dict[str, Any] = field(default_factory=dict)
    """What a stage carries along besides weights, such as how many prompts it has asked."""

    @property
    def updates(self) -> int:
        """How often the weights were updated."""
        return self.step - self.skipped


class Diverged(ValueError):
    """Batch after batch is bad, and going back has not helped."""


class Stopped(Exception):
    """Asked to stop in the middle of what the next attempt will do from its beginning."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this rank. A stage's own batches add their tensors."""

    weight: float
    """What the loss sums over: tokens trained on, or pairs. The loop divides by it."""
    work: Work
    """What it asks of the model, for the meters."""
    samples: int
    """How many samples it holds, for the position in the data; 0: idle, nothing of it counts."""


B = TypeVar("B", bound=Batch)


STAYS = {"stays": True}
"""Metadata of a batch's field that does not go to the device with the others."""


def mapped(item: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """The same with `act` done to each of its tensors, such as a batch on another device; but what stays."""
    if isinstance(item, Tensor):
        return act(item)
    if not is_dataclass(item) or isinstance(item, type):
        return item
    going = [one.name for one in fields(item) if "stays" not in one.metadata]
    return replace(item, **{name: mapped(getattr(item, name), act) for name in going})


def moved(item: Any, device: torch.device) -> Any:
    """The same with its tensors on a device."""
    return mapped(item, lambda tensor: tensor.to(device))


def parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in groups of at most `size`: a batch as micro-batches."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def micro_batches(
    own: Sequence[T], most: int, size: int, collate: Callable[[Sequence[T]], B], spare: Sequence[T] = ()
) -> Iterator[B]:
    """A rank's samples in micro-batches of at most `size`: as many as a rank with `most` samples has.

    ZeRO 2 and 3 talk to the other ranks in every forward or backward, so a rank that has fewer goes along
    with an idle one: its first sample again (or of `spare`), which counts nothing.
    """
    for part in parts(own, size):
        yield collate(part)
    for _ in range(math.ceil(most / size) - math.ceil(len(own) / size)):
        yield replace(collate((own or spare)[:1]), weight=0.0, work=NOTHING, samples=0)


def measured(
    items: Sequence[T], size: int, run: "Running", collate: Callable[[Sequence[T]], B]
) -> Iterator[B]:
    """This data rank's share of what is only measured, in micro-batches of at most `size` on its device."""
    mesh = run.mesh
    own = places(0, len(items), mesh.data_rank, mesh.data)
    most = math.ceil(len(items) / mesh.data)
    for batch in micro_batches(items[own.start : own.stop], most, size, collate, spare=items):
        run.pause()
        yield moved(batch, mesh.device)


def check_shards(folder: Path, mesh: Mesh) -> None:
    """Compares token shards with their sums, each rank a part of them; what one finds all raise."""
    sums = written(folder)
    wrong = first_damaged(sums, mesh.rank, mesh.world)
    if path := read_again(mesh, wrong, lambda path: sha256(path) == sums[path]):
        raise ValueError(
            f"{path} is damaged: its sha256 is not what the manifest says; copy the file again, or delete "
            f"{folder} and run the stage again that wrote it"
        )


@dataclass(frozen=True)
class Losses:
    """What a micro-batch costs, as sums over what its weight counts."""

    losses: dict[str, Tensor]
    """One scalar for each trained model; its gradient goes there alone."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums to be reported as means, such as {"accuracy": number of pairs ranked right}."""


def load_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """For `Losses.metrics`: how busy the busiest expert was just now; nothing of a dense model."""
    load = checkpoint.trunk(model).load
    return {} if load is None else {"expert_load": load * batch.weight}


@dataclass
class Running:
    """A stage at work: what its methods are given."""

    mesh: Mesh
    tokenizer: Tokenizer
    progress: Progress
    fingerprint: str = ""
    """Of the settings and inputs, as rank 0 sees them."""
    total: int = 0
    """Optimizer steps of the whole run."""
    flops: Flops | None = None
    """What training takes; None where it is not counted."""
    engines: dict[str, Engine] = field(default_factory=dict)
    """The models in training, by role. `model` is the one to talk to."""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    """Models that only judge: a reference, a reward model."""
    data: Any = None
    """What `Task.prepare` made."""
    notes: dict[str, float] = field(default_factory=dict)
    """Figures to add to the next logged row, such as the mean reward of a rollout."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Rows to add to `answers.jsonl`: some of what a model has just answered, and what that was worth."""
    watch: Watch = field(default_factory=Watch)
    """Is told what the run is about to do."""
    skipped: Skipped = field(default_factory=Skipped)
    """Which samples are left out."""
    bad: int = 0
    """How many batches in a row the guard has found bad, up to the last."""
    asked: Callable[[], bool] = lambda: False
    """Whether this rank has been asked to stop."""
    fence: Callable[[], None] = lambda: None
    """Raises Superseded, on all ranks, when a newer start of this run has taken over."""

    def pause(self) -> None:
        """To be called by all ranks in the middle of a validation or a rollout, which may take long.

        Raises Stopped when one of them has been asked to stop.
        """
        if self.mesh.any(self.asked()):
            raise Stopped

    @property
    def synced(self) -> Callable[[bool], bool] | None:
        """For `generate`: where ranks need each other in a forward pass, all go on until the last is done."""
        sharded = self.mesh.world > 1 and any(
            engine.parallel.zero == 3 or engine.parallel.expert > 1 for engine in self.engines.values()
        )
        return self.mesh.all if sharded else None


class Task(Stage):
    """A training stage: settings, its batches, and what one costs."""

    trains: ClassVar[bool] = True
    passes: ClassVar[int] = 3
    """A step takes as much as so many forward passes through the model, two of which are its backward pass.
    0: it takes more than can be told by them, and MFU is n/a."""

    shares_rows: ClassVar[bool] = False
    """Whether its losses are those of whole rows (`parallel.sequence`)."""

    parallel: Parallel
    """How the model is spread over processes."""
    optimizer: Optimizer
    """What turns gradients into steps."""
    schedule: Schedule
    """The learning rate over the run."""
    clip: NonNegativeFloat
    """The largest gradient norm; 0 switches clipping off."""
    guard: Guard
    """When a step is not to be trusted."""
    skip: list[Span]
    """Samples to leave out, as [[first, last], ...] by their place in the order of the data: a batch that
    holds one of them is passed over, and the step is taken without an update."""
    context: PositiveInt
    """Tokens in one row, at most."""
    batch: PositiveInt
    """Samples of one optimizer step, over all ranks: any number of them, but each needs one."""
    micro_batch: PositiveInt
    """Samples that pass through the model at once on one rank, at most."""
    max_steps: PositiveInt | None
    """Take at most so many optimizer steps, whatever the budget says; null takes all."""
    checkpoint_interval: NonNegativeInt
    """Optimizer steps between checkpoints, which are of its multiples; 0 saves at the end only."""
    checkpoint_keep: PositiveInt
    """How many checkpoints stay on disk: the newest ones. There must be room for one more, or, while there is
    not, the older ones make way."""
    checkpoint_keep_every: NonNegativeInt
    """Those whose step is a multiple of this, and of the interval, stay for good, too; 0 for none."""
    checkpoint_background: bool
    """Write them while the training goes on, from a copy in host memory; it waits for the copy only."""
    validation_interval: NonNegativeInt
    """Optimizer steps between validations; 0 validates at the end only."""
    watch: Watching
    """When a run that stands still is ended, and which rank is called slow."""
    preflight: bool
    """Look before the start: at every node (GPU, network, run folder, clock), and, in pretraining, at whether
    memory, corpus and vocabulary will do."""
    profile: bool
    """Trace a few steps of rank 0: `profile.md` in the stage's folder says where their time went."""
    resume: Literal["same", "any"]
    """`same`: go on only from a checkpoint of the same settings; `any`: from the newest, whatever changed."""

    neutral: ClassVar[tuple[str, ...]] = (
        "parallel", "micro_batch", "checkpoint_interval", "checkpoint_keep", "checkpoint_keep_every",
        "checkpoint_background", "validation_interval", "resume", "watch", "guard",
        "preflight", "profile",
    )  # fmt: skip
    """Settings that may change when a run goes on: they do not change what is learnt."""

    @field_validator("parallel")
    @classmethod
    def _divides_the_job(cls, parallel: Parallel) -> Parallel:
        world = expected_world()
        for name in ("tensor", "sequence", "expert"):
            if cls.trains and world % getattr(parallel, name):
                raise ValueError(
                    f"{name}={getattr(parallel, name)} does not divide the {world} processes of this job; "
                    f"use one of {divisors(world)}"
                )
        if parallel.sequence > 1 and not cls.shares_rows:
            raise ValueError(
                f"sequence={parallel.sequence} shares the tokens of a row among ranks, which only "
                f"pretrain does; use sequence=1 for {cls.name}"
            )
        return parallel

    @model_validator(mode="after")
    def _orthogonal_matrices_are_whole(self) -> "Task":
        if self.parallel.expert > 1 and self.optimizer.orthogonal:
            raise ValueError(
                f"parallel.expert={self.parallel.expert} spreads matrices over ranks that optimizer=muon "
                "wants to gather; use optimizer=adamw, or parallel.expert=1"
            )
        return self

    @property
    def continues(self) -> bool:
        """With `resume: any`."""
        return self.resume == "any"

    def foresee(self, run: Running) -> None:
        """Raises what can be told to be wrong before anything large is loaded. All ranks call it."""

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The models to train, by role, and their starting weights."""
        raise NotImplementedError

    def prepare(self, run: Running) -> int:
        """Loads data into `run.data` and judges into `run.frozen`.

        Returns how many optimizer steps the run takes.
        """
        raise NotImplementedError

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """For each optimizer step from `run.progress` on: this data rank's micro-batches."""
        raise NotImplementedError

    def loss(self, run: Running, batch: Any) -> Losses:
        """What a micro-batch costs, with gradients."""
        raise NotImplementedError

    def measure(self, run: Running) -> dict[str, float]:
        """Figures on data that is not trained on. All ranks call it and get the same."""
        return {}

    def rate_of(self, role: str) -> float:
        """The learning rate of one of the models, as a multiple of the optimizer's."""
        return 1.0

    def along(self) -> int:
        """How many forward passes judges take beside a model in training, over the same rows."""
        return 0

    def may_stop(self, run: Running) -> bool:
        """Whether the step just taken is a place to resume from (not in the middle of a rollout)."""
        return True

    def shifts(self, run: Running) -> bool:
        """Whether the next step's data is of another kind, whose losses are not those of the steps before."""
        return False

    def samples_of(self, run: Running, first: int, last: int) -> str:
        """What the samples of these numbers are, for a person who looks for a bad one; "" says nothing."""
        return ""

    def conclude(self, run: Running) -> None:
        """What is worked out once, after the last step, to be saved with the models. All ranks call it."""

    def show(self, run: Running) -> str | None:
        """A sample of what the model does now, for the log; None for none. All ranks call it."""
        return None

    def execute(self) -> None:
        """Trains until done, or until asked to stop."""
        fit(self)


def fit(task: Task) -> None:
    """Runs a training stage from its newest checkpoint, or from the start, to the end."""
    spread = task.parallel
    mesh = start(spread.tensor, task.watch.start, task.watch.timeout, spread.sequence)
    if task.batch < mesh.data:
        raise ValueError(
            f"batch={task.batch} has no sample for some of the {mesh.data} data-parallel ranks; "
            f"use batch={mesh.data} or more, or fewer ranks"
        )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopFlag())
        watch = stack.enter_context(Watch(task.watch, mesh))
        # One rank decides whether there is anything to do, before any rank writes.
        if mesh.any(mesh.rank == 0 and not begin(task)):
            return
        watch.follow(task.folder)
        watch.at("load")
        begun = time.monotonic()
        run, saver = loaded(task, mesh, watch)
        run.asked = lambda: stop.requested
        begun -= run.progress.seconds  # of earlier attempts
        recorder = stack.enter_context(Recorder(task, run.progress.step))
        bar = stack.enter_context(progress(task.name, run.total, "step", run.progress.step))
        profile = None
        if task.profile and mesh.rank == 0:
            title = f"{task.name}: rank 0 of {mesh.world}, steps from {run.progress.step + 1} on"
            left = run.total - run.progress.step
            profile = stack.enter_context(Profile(task.folder, title, watch, mesh.device, left))
        Trainer(task, run, saver, recorder, bar, begun, profile).train()


def loaded(task: Task, mesh: Mesh, watch: Watch) -> tuple[Running, Saver]:
    """All that training needs, as the newest checkpoint has it, and what writes the next ones."""
    mine = attempt.claim(task.folder, mesh)
    torch.manual_seed(task.seed)
    tokenizer = Tokenizer.load(task.input("tokenizer"))
    fence = partial(mine.fence, task.folder, mesh)
    run = Running(mesh, tokenizer, Progress(), watch=watch, fence=fence)
    if task.preflight:
        task.foresee(run)
    blueprints = task.models(run)
    models = {role: blueprint.model for role, blueprint in blueprints.items()}
    # One rank's word: on another node a copy of a file may have another time.
    run.fingerprint, made_of = mesh.lead(lambda: (task.fingerprint(), task.made_of()))
    trunk = checkpoint.trunk(models["model"])
    check_fits(trunk.config, task.parallel.tensor, task.parallel.expert)
    run.flops = flops_of(task, models["model"])
    if task.preflight and (mesh.world > 1 or mesh.device.type == "cuda"):
        watch.at("preflight")
        preflight(mesh, task.folder, _checkpoint_bytes(models))
        watch.at("load")
    about = {
        "stage": task.name,
        "fingerprint": run.fingerprint,
        "made_of": made_of,
        "tokenizer": tokenizer.sha256,
        "architecture": {role: checkpoint.architecture(model) for role, model in models.items()},
    }
    saved = checkpoint.newest(task.folder / "checkpoints", mesh, fence)
    if saved is not None:
        _check(saved, task, run, models, made_of)
    run.engines = engines(task, blueprints, mesh, filled=saved is None)
    be_patient(task.watch.timeout)
    if saved is not None:
        run.progress = restore(saved, run)
        say(f"{task.name}: goes on from step {run.progress.step} ({saved.path})")
    watch.at("prepare")
    run.total = min(task.prepare(run), task.max_steps or sys.maxsize)
    run.skipped = Skipped(task.skip, task.folder / "skipped.jsonl")
    fence()  # this start may have been frozen while it loaded; from here on it writes
    run.skipped.recall(run.fingerprint, run.progress.step, mesh)
    mesh.lead(lambda: _describe(task, tokenizer))
    saver = Saver(
        task.folder / "checkpoints",
        run.engines,
        about,
        mesh,
        mine,
        interval=task.checkpoint_interval,
        keep=task.checkpoint_keep,
        keep_every=task.checkpoint_keep_every,
        background=task.checkpoint_background,
        step=None if saved is None else run.progress.step,
    )
    return run, saver


def engines(
    task: Task, blueprints: Mapping[str, Blueprint[Any]], mesh: Mesh, filled: bool = True
) -> dict[str, Engine]:
    """The models, spread over the ranks; `filled` with their starting weights, or with none."""
    made = {}
    for role, blueprint in blueprints.items():
        groups = task.optimizer.groups(blueprint.model)
        made[role] = Engine(blueprint.model, task.optimizer.build, groups, task.parallel, task.clip, mesh)
        if filled:
            made[role].fill(blueprint.read)
    return made


def flops_of(task: Task, model: nn.Module) -> Flops | None:
    """What training this model takes; None where that is not counted."""
    if not task.passes:
        return None
    trunk = checkpoint.trunk(model)
    vocab = trunk.vocab if isinstance(model, GPT) else 0  # a score from each state is next to nothing
    again: dict[Checkpointing, Literal["none", "attention", "blocks"]] = {
        "none": "none",
        "selective": "none" if torch.cuda.is_available() else "attention",
        "full": "blocks",
    }
    frozen = not trunk.embed.weight.requires_grad
    passes = task.passes + task.along()
    return Flops(trunk.config, vocab, passes, again[task.parallel.checkpointing], frozen)


def _describe(task: Task, tokenizer: Tokenizer) -> None:
    """Into the run's folder: what it was asked for, and what its tokens mean."""
    record_config(task)
    tokenizer.save(task.folder / "tokenizer.model")


class Trainer:
    """The loop over steps, and what is done between two of them. All ranks do the same."""

    def __init__(
        self,
        task: Task,
        run: Running,
        saver: Saver,
        recorder: Recorder,
        bar: Any,
        begun: float,
        profile: Profile | None = None,
    ) -> None:
        """`begun` is when it would have begun, had no earlier attempt been cut off."""
        self.task, self.run, self.saver, self.recorder, self.bar = task, run, saver, recorder, bar
        self.begun, self.looked, self.profile = begun, time.monotonic(), profile
        self.meter = _Meter(run, peak_of_all(run.mesh, "bf16" if task.parallel.bf16 else "fp32"))
        self.compared = run.progress.step
        """Up to where replicas are known to be the same."""
        self.rollbacks = 0
        """How often the run has gone back since its last checkpoint."""
        self.stuck = -1
        """The updates of the checkpoint that the run went back to."""

    def train(self) -> None:
        """To the end, or until asked to stop."""
        task, run, saver = self.task, self.run, self.saver
        stopping = run.mesh.any(run.asked())  # while models and data were prepared
        if _validation_due(task, run) and not stopping:  # an earlier attempt was asked to stop before it
            stopping = not self.validate()
            if run.notes:
                self.record_answers()
                self.recorder.row({"step": run.progress.step, **run.notes})
                run.notes.clear()
        if run.progress.step >= run.total:
            say(
                f"{task.name}: all of its {run.total:,} steps have been taken; there is nothing left to train"
            )
        steps = task.batches(run)
        while run.progress.step < run.total and not stopping:
            if self.profile is not None:
                self.profile.step()
            run.watch.at("data", run.progress.step + 1)
            _reseed(task.seed, run)
            try:
                batches = next(steps)
            except Stopped:
                stopping = True
                if saver.tried != run.progress.step and not run.bad:
                    self.save()
                break
            rate = task.optimizer.lr * task.schedule.factor(run.progress.step, run.total)
            sums = train_step(task, run, batches, rate)
            run.progress.step += 1
            run.watch.stepped(run.progress.step)
            if run.bad >= task.guard.rollback_after:
                self.go_back(rate)
                steps = task.batches(run)
                continue
            self.meter.add(sums, rate)
            self.bar.update()
            run.watch.at("poll")
            if saver.ready():
                run.watch.at("save")
                saver.finish()
            stopping = self.after_step(sums, rate)
        if self.profile is not None and not stopping:
            self.profile.step()
        stopping = stopping or not self.conclude()
        run.watch.at("save")
        saver.finish()
        if stopping:
            saved_at = "nothing is saved yet" if saver.step is None else f"saved at step {saver.step}"
            say(f"{task.name}: asked to stop; {saved_at}, the same command goes on from there")
        else:
            self.finish()

    def after_step(self, sums: Mapping[str, float], rate: float) -> bool:
        """Compares, validates, logs and saves when it is time to. Returns whether it is time to stop."""
        task, run, saver = self.task, self.run, self.saver
        stopping = task.may_stop(run) and self.asked_to_stop()
        last = run.progress.step == run.total
        if task.guard.compare and run.progress.step % task.guard.compare == 0:
            self.compare()
        if _validation_due(task, run) and not stopping:
            stopping = not self.validate()
        lost = run.bad and last and run.mesh.any(_broken(run))
        if last and not stopping and (lost or run.progress.updates == self.stuck):
            saver.finish()
            raise _diverged(task, run, rate, "and so it is at the end")
        run.watch.at("log")
        run.progress.seconds = time.monotonic() - self.begun
        if last or run.notes or run.progress.step % task.log.interval == 0:
            run.notes |= saver.take_figures()
            self.record_answers()
            row = self.meter.report(run.progress.seconds)
            self.recorder.row(row)
            self.bar.set_postfix_str(_short(row), refresh=False)
        # Not after a bad batch: it may be the weights, and then the checkpoint is the way back.
        due = bool(sums) and saver.due(run.progress.step) and task.may_stop(run) and not last
        if due or (stopping and not run.bad):
            self.save()
            self.rollbacks = 0
        return stopping

    def record_answers(self) -> None:
        """Writes down what there is."""
        self.recorder.answers(self.run.progress.step, self.run.answers)
        self.run.answers.clear()

    def compare(self) -> None:
        """Ends the run when replicas of the weights differ."""
        self.run.watch.at("compare")
        try:
            compare(self.run.engines, self.run.mesh, self.compared)
        except Unequal:  # on all ranks alike: what is being saved was compared
            self.saver.finish()
            raise
        self.compared = self.run.progress.step

    def save(self) -> None:
        """Begins a checkpoint, of weights that have been compared."""
        if self.task.guard.compare:
            self.compare()
        self.run.watch.at("save")
        self.recorder.written()  # rows up to a checkpoint are not to be missing when the run goes on from it
        self.saver.save(asdict(self.run.progress))

    def validate(self) -> bool:
        """Measures, and shows a sample. False: it was asked to stop meanwhile."""
        run = self.run
        run.watch.at("validation")
        try:
            figures = self.task.measure(run)
            run.watch.at("sample")
            shown = self.task.show(run)
        except Stopped:
            return False
        run.notes |= {f"validation/{name}": value for name, value in figures.items()}
        self.recorder.sample(run.progress.step, shown)
        run.progress.validated = run.progress.step
        return True

    def conclude(self) -> bool:
        """What the stage works out at its end goes into the last checkpoint. False: it was asked to stop."""
        run, saver = self.run, self.saver
        run.watch.at("validation")
        try:
            self.task.conclude(run)
        except Stopped:
            if saver.tried != run.progress.step and not run.bad:
                self.save()
            return False
        saver.finish()
        described = {role: checkpoint.architecture(engine.module) for role, engine in run.engines.items()}
        if described != saver.about["architecture"]:
            saver.about["architecture"] = described
            saver.step = None  # should this step be saved already, then without it
        return True

    def asked_to_stop(self) -> bool:
        """Whether any rank has been. Raises Superseded when a newer start has taken over."""
        run = self.run
        if not run.mesh.any(run.asked() or self.superseded()):
            return False
        run.fence()
        return run.mesh.any(run.asked())

    def superseded(self) -> bool:
        """Whether rank 0 sees that a newer start has taken over. It looks now and then."""
        now = time.monotonic()
        if self.run.mesh.rank or now - self.looked < LOOK:
            return False
        self.looked = now
        try:
            self.saver.attempt.check(self.task.folder)
        except Superseded:
            return True
        except (OSError, ValueError):  # a disk that does not answer: the next save will tell
            pass
        return False

    def go_back(self, rate: float) -> None:
        """To the newest checkpoint: too many batches in a row were bad."""
        self.rollbacks += 1
        _roll_back(self.task, self.run, self.saver, self.rollbacks, rate)
        self.stuck, step = self.run.progress.updates, self.run.progress.step
        self.saver.step = self.saver.tried = self.compared = self.bar.n = step
        self.recorder.rewind(step)
        self.run.answers.clear()
        self.meter.restart()

    def finish(self) -> None:
        """The last checkpoint, without which a stage is not done."""
        task, run, saver = self.task, self.run, self.saver
        for wait in (0.0, *AGAIN):
            if saver.step != run.progress.step:
                time.sleep(wait)
                self.save()
                saver.finish()
        if saver.step != run.progress.step:
            raise OSError(
                f"the final checkpoint of {task.name} could not be written; "
                "free some disk space and run again"
            )
        run.watch.at("finish")
        if run.mesh.rank == 0:
            self.recorder.checkpoint(checkpoint.latest(task.folder).path)
        run.mesh.lead(lambda: finish(task, run.progress.seconds))


def train_step(task: Task, run: Running, batches: list[Batch], rate: float) -> dict[str, float]:
    """One optimizer step: forward and backward over the micro-batches, then clip and step, if all is sound.

    Returns sums over all ranks; {} of a step without an update, whose batch is skipped.
    """
    run.watch.at("count")
    counts = [[batch.weight, batch.samples, *astuple(batch.work)] for batch in batches]
    local = torch.tensor(counts, dtype=torch.float64).sum(0)
    weight, samples, *work = run.mesh.sum_tensor(local).tolist()
    first, last = run.progress.samples, run.progress.samples + int(samples) - 1
    if task.shifts(run):
        run.progress.recent = []
    known = why = run.skipped.why(first, last)
    sums: dict[str, float] = {}
    if not known:
        result = attempt_step(task, run, batches, weight, rate)
        if result.wrong and not run.bad and not result.stepped:  # is it the batch or the hardware?
            _reseed(task.seed, run)
            doubtful, result = result, attempt_step(task, run, batches, weight, rate)
            if not result.wrong:
                say(
                    f"ALARM: step {run.progress.step + 1}: {doubtful.wrong}; computed again it is sound, so "
                    f"a chip has miscounted, of {culprits(doubtful.own, result.own, run.mesh)}; "
                    "the second result counts"
                )
        sums, why = result.sums, result.wrong
        run.bad = run.bad + 1 if why else 0
    if why:
        what = task.samples_of(run, first, last)
        say(
            f"{task.name}: step {run.progress.step + 1} skipped: {why}; samples {first}-{last} of the order"
            + (f" ({what})" if what else "")
        )
        run.progress.skipped += 1
        if not known:
            run.fence()
            run.skipped.add(run.progress.step + 1, first, last, why)
    elif task.guard.spike:
        run.progress.recent = [*run.progress.recent, sums["loss"] / weight][-task.guard.window :]
    done = dict(zip(("tokens", "pairs", "logits"), work, strict=True))
    run.progress.tokens += int(done["tokens"])
    run.progress.samples += int(samples)
    return {} if why else sums | {"weight": weight} | done


@dataclass(frozen=True)
class Result:
    """What came of a batch."""

    sums: dict[str, float]
    """Over all ranks."""
    own: Tensor
    """This rank's share of them."""
    wrong: str
    """What is wrong; then there was no update."""
    stepped: bool
    """Whether a model was updated: of several, one may have a gradient that is not finite."""


def attempt_step(task: Task, run: Running, batches: list[Batch], weight: float, rate: float) -> Result:
    """Forward, backward, and the step, unless something is wrong."""
    summed: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        run.watch.at("forward")
        result = task.loss(run, batch)
        run.watch.at("backward")
        counts = float(batch.samples > 0)  # an idle one's gradients are exactly 0
        for role, loss in result.losses.items():
            run.engines[role].backward(counts * loss / weight, last=index == len(batches) - 1)
            name = "loss" if role == "model" else f"{role}/loss"
            summed[name] = summed.get(name, 0.0) + counts * loss.detach().double()
        for name, value in result.metrics.items():
            summed[name] = summed.get(name, 0.0) + counts * value.detach().double()
    run.watch.at("sum")
    own = torch.stack(list(summed.values()))
    sums = dict(zip(summed, run.mesh.sum_tensor(own.clone()).tolist(), strict=True))
    why = task.guard.objection(sums, weight, run.progress.recent)
    if task.parallel.together > 1 and run.mesh.any(
        bool(why)
    ):  # ranks of one group may differ in the last bit
        why = why or "another rank objects"
    run.watch.at("step")
    if len(result.losses) > 1 and not why:  # none of several is to be updated when another cannot be
        broken = [role for role in result.losses if run.mesh.any(not run.engines[role].finite_gradients())]
        why = " and ".join(f"a gradient of {role} is not finite" for role in broken)
    stepped = False
    for role in result.losses:
        if why and not stepped:
            run.engines[role].skip()
            continue
        norm = run.engines[role].step(rate * task.rate_of(role))
        name = "gradient_norm" if role == "model" else f"{role}/gradient_norm"
        sums[name] = norm * weight
        if math.isfinite(norm):
            stepped = True
        else:
            why = f"{name} is {norm}" + ("; another model was updated all the same" if stepped else "")
    return Result(sums, own, why, stepped)


class _Meter:
    """Adds up steps between two logged rows; means are over the weight, throughput over the wall clock."""

    def __init__(self, run: Running, peak: float | None) -> None:
        """`peak` is that of all devices together, in FLOP/s."""
        self.run, self.peak = run, peak
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps, self.since = 0, time.monotonic()
        self.run.watch.split.take(1)

    def add(self, sums: dict[str, float], rate: float) -> None:
        self.rate = rate
        self.steps += 1
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def report(self, seconds: float) -> dict[str, float | int | None]:
        """The row to log; the sums start again."""
        split = self.run.watch.split.take(self.steps)
        # Validations and traces take their time, but not the training's.
        beside = sum(split.get(f"time/{part}", 0.0) for part in ("validation", "profile"))
        passed = max(1e-9, time.monotonic() - self.since - beside * max(self.steps, 1))
        weight = self.sums.pop("weight", None)  # None: all batches were skipped
        work = Work(*(self.sums.pop(name, 0.0) for name in ("tokens", "pairs", "logits")))
        flops = self.run.flops
        possible = None if self.peak is None or flops is None else self.peak * passed
        row: dict[str, float | int | None] = {
            "step": self.run.progress.step,
            **{name: value / weight for name, value in self.sums.items() if weight},
            "learning_rate": self.rate,
            "tokens": self.run.progress.tokens,
            "tokens_per_second": work.tokens / passed,
            "mfu": flops.of_model(work) / possible if flops and possible else None,
            "hfu": flops.of_hardware(work) / possible if flops and possible else None,
            "memory_gib": memory_gib(self.run.mesh.device),
            "seconds": seconds,
            **split,
            **self.run.watch.figures,
            **({"guard/skipped": self.run.progress.skipped} if self.run.progress.skipped else {}),
            **self.run.notes,
        }
        self.run.notes.clear()
        self.restart()
        return row


def _broken(run: Running) -> bool:
    """Whether a figure of the weights, or what this rank holds of them, is not finite."""
    figures = all(map(math.isfinite, run.notes.values()))
    return not figures or not all(engine.finite_weights() for engine in run.engines.values())


def _validation_due(task: Task, run: Running) -> bool:
    """At each interval and at the end, once."""
    step, interval = run.progress.step, task.validation_interval
    at_one = step == run.total or bool(interval and step % interval == 0)
    return 0 < step != run.progress.validated and at_one


def _short(row: dict[str, float | int | None]) -> str:
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.0%}"
    extra = [
        f"{name.rpartition('/')[2]} {row[name]:.3f}"
        for name in row
        if name.startswith(("validation/", "reward/mean"))
    ]
    loss = f"loss {row['loss']:.3f}" if "loss" in row else "no loss"
    return ", ".join([loss, *extra, f"{row['tokens_per_second']:,.0f} tok/s", f"MFU {mfu}"])


def _check(
    saved: checkpoint.Checkpoint,
    task: Task,
    run: Running,
    models: Mapping[str, nn.Module],
    made_of: dict[str, Any],
) -> None:
    """Refuses to go on from a checkpoint with what it was not made of, and says what has changed."""
    saved.check_tokenizer(run.tokenizer)
    before = saved.manifest.get("made_of")
    changed = differences(before, made_of) if before else ["it does not say what it was made of"]
    listed = "".join(f"\n  {line}" for line in changed)
    try:
        for role, model in models.items():
            shapes = {f"weight.{name}": parameter.shape for name, parameter in model.named_parameters()}
            saved.check_shapes(role, shapes)
    except ValueError as error:
        remedy = "set the model's settings back, or give another run=... (resume=any cannot help)"
        raise ValueError(f"{error}; {remedy}; what has changed:{listed}") from None
    if saved.manifest["fingerprint"] == run.fingerprint:
        return
    if task.resume == "same":
        raise ValueError(
            f"{saved.path} was trained with other settings or data; set them back, give another run=..., "
            f"delete {task.folder} to start over, or go on regardless with resume=any. "
            f"What has changed:{listed}"
        )
    say(f"{task.name}: goes on, for resume=any, although there have changed:{listed}")


def restore(saved: checkpoint.Checkpoint, run: Running) -> Progress:
    """Puts weights and moments back into the engines, also in the middle of a run.

    Returns how far they are. Before `checkpoint.newest` in the middle of a run, `saver.finish()`.
    """
    try:
        progress = Progress(**saved.manifest["progress"])
    except TypeError as error:
        raise ValueError(f"{saved.path} was written by another version of megachat: {error}") from None
    for role, engine in run.engines.items():
        saved.check_shapes(role, engine.tensors())
        counted = saved.manifest.get("optimizer_steps", {}).get(role, progress.step)
        engine.load_logical(saved.reader(role), counted)
    if saved.manifest["fingerprint"] != run.fingerprint:
        progress.recent = []  # other data or another rate: its losses are no measure of the next ones
    return progress


def _roll_back(task: Task, run: Running, saver: Saver, times: int, rate: float) -> None:
    """Back to the newest checkpoint, for the `times`-th time without getting further."""
    run.watch.at("going back")
    saver.finish()
    saved = checkpoint.newest(
        task.folder / "checkpoints", run.mesh, lambda: saver.attempt.fence(task.folder, run.mesh)
    )
    if saved is None or times > task.guard.give_up:
        where = f"going back to {saved.path.name} has not helped" if saved else "no checkpoint to go back to"
        raise _diverged(task, run, rate, where)
    at = run.progress.step
    run.progress = restore(saved, run)
    run.bad = 0
    say(
        f"ALARM: {task.name}: {task.guard.rollback_after} bad batches in a row, so it may be the weights: "
        f"back from step {at} to step {run.progress.step} ({saved.path}), and on without those batches"
    )


def _diverged(task: Task, run: Running, rate: float, where: str) -> Diverged:
    step, first, last, why = astuple(run.skipped.found[-1])
    for found in reversed(run.skipped.found):
        if found.last + 1 >= first:  # of the bad batches in a row
            first = found.first
    return Diverged(
        f"{why} at step {step}, at learning rate {rate:g}, and samples {first}-{last} of the order were bad "
        f"one and all; {where}: training has diverged. Lower optimizer.lr or lengthen schedule.warmup, or, "
        f"if it is those samples, leave them out with skip=[[{first},{last}]]; then add resume=any to go on "
        "from the newest checkpoint"
    )


def _checkpoint_bytes(models: dict[str, nn.Module]) -> int:
    """At most: a weight and two moments in fp32 for every parameter."""
    return 12 * sum(parameter.numel() for model in models.values() for parameter in model.parameters())


def _reseed(seed: int, run: Running) -> None:
    """Makes what is random in a step (dropout, sampling) a function of the seed, the step, the data read."""
    place = run.mesh.replica_rank  # that of the data, where ranks do not share rows
    digest = hashlib.blake2b(f"{seed} {run.progress.step} {place}".encode(), digest_size=8)
    torch.manual_seed(int.from_bytes(digest.digest()) >> 1)


class _StopFlag:
    """Whether SIGTERM, SIGUSR1 or Ctrl-C has arrived. A second Ctrl-C stops at once.

    The loop looks at it between steps, on all ranks together.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_StopFlag":
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        return self

    def _request(self, number: int, _: Any) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            say("stopping after this step; Ctrl-C again stops at once, without saving")

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
