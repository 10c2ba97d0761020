"""What a run says of itself: lines and a progress bar on the console, `metrics.jsonl`, and W&B.

The one file that imports wandb. Only rank 0 speaks.
"""

import json
import netrc
import os
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import PositiveInt
from tqdm import tqdm

from megachat.config import Config, redact
from megachat.files import replacing, write_json

if TYPE_CHECKING:
    from megachat.run import Stage

T = TypeVar("T")


class Log(Config):
    """What is printed and recorded."""

    interval: PositiveInt
    """Optimizer steps between two logged lines."""
    wandb: Literal["auto", "online", "offline", "disabled"]
    """`auto`: what $WANDB_MODE says, else online when logged in (WANDB_API_KEY or netrc), else offline."""
    project: str
    """The W&B project."""


def is_main() -> bool:
    """Whether this process is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """One line for the person at the terminal, from rank 0 alone; it does not tear a progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterates with a progress bar on a terminal; in a log file, with a plain line every ten seconds."""
    with progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def progress(what: str, total: int | None, unit: str = "it", initial: int = 0) -> Any:
    """A progress bar with an estimate of the time left; in a log file, plain lines."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=initial,
        disable=not is_main(),
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.2 if terminal else 10.0,
        delay=0.0 if terminal else 10.0,
        maxinterval=10.0,
        dynamic_ncols=terminal,
        ascii=None if terminal else " .",
        unit_scale=True,
        leave=terminal,
    )


_FAILED: set[Path] = set()
"""What could not be written, and has been told of."""


@contextmanager
def _bookkeeping(path: Path) -> Iterator[None]:
    """A full disk must not end a run, nor rank 0 alone, for a line in its books: it is said once of each."""
    try:
        yield
    except OSError as why:
        if path not in _FAILED:
            _FAILED.add(path)
            say(f"ALARM: {path} cannot be written ({why}); the run goes on, and what belongs there is lost")


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file of rows; when that fails the row is lost, and nothing of it stays."""
    with _bookkeeping(path):
        before = path.stat().st_size if path.is_file() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise


def rewrite(path: Path, kept: Iterable[Mapping[str, Any]]) -> None:
    """Puts these rows in place of what a file of rows holds; when that fails it stays as it is."""
    with _bookkeeping(path), replacing(path) as temporary:
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")


class _Lines:
    """Turns the carriage returns of a progress bar into lines, for output that is not a terminal."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


UNITS = {"loss": "loss_nats", "seconds": "elapsed_seconds"}
"""Names on the dashboard where the short one does not say its unit."""


PATIENCE = {"init_timeout": 30.0, "finish_timeout": 60.0}
"""Seconds that W&B may take to begin a run and to end it; WANDB_INIT_TIMEOUT and its like say otherwise."""


class Recorder:
    """A stage's figures: `metrics.jsonl`, `samples.jsonl`, `answers.jsonl` in its folder, and a W&B run.

    Rank 0 writes, others do nothing. Rows are written by a thread: a slow disk, or W&B, costs a step no time.
    """

    def __init__(self, stage: "Stage", step: int = 0) -> None:
        """`step` is where the run goes on: later rows, left by an attempt that was cut off, are dropped."""
        self.stage = stage
        self.wandb: Any = None
        self._writer = ThreadPoolExecutor(1, "recorder")
        self._rows: deque[Future[None]] = deque()
        if not is_main():
            return
        self.rewind(step)
        self.samples: list[list[Any]] = []
        if stage.log.wandb != "disabled":
            self._start_wandb()

    def rewind(self, step: int) -> None:
        """Drops the rows behind a step, which the run is about to take once more."""
        if not is_main():
            return
        self.written()
        for name in ("metrics.jsonl", "samples.jsonl", "answers.jsonl"):
            path = self.stage.folder / name
            rewrite(path, (row for row in rows(path) if row["step"] <= step))

    def _start_wandb(self) -> None:
        import wandb

        stage, mode = self.stage, self.stage.log.wandb
        if mode == "auto":
            mode = chosen_mode()
        if mode == "disabled":
            return
        identity = stage.folder / "wandb.json"
        if not identity.is_file():
            write_json(identity, {"id": uuid.uuid4().hex[:12]})
        settings: dict[str, Any] = {
            "project": stage.log.project,
            "group": stage.run.name,
            "job_type": stage.name,
            "name": f"{stage.run.name}-{stage.name}",
            "dir": stage.run,
            "id": json.loads(identity.read_text())["id"],
            "resume": "allow",
            "config": redact(stage.tree),
            "settings": wandb.Settings(silent=True, console="off", **_patience(wandb.Settings.model_fields)),
        }
        try:
            self.wandb = wandb.init(mode=mode, **settings)
        except wandb.Error as why:
            if mode == "offline":
                raise
            say(f"{stage.name}: W&B cannot be reached ({why}), so this run is recorded offline")
            mode = "offline"
            wandb.teardown()  # its process still holds the run's id, and would refuse it
            self.wandb = wandb.init(mode=mode, **settings)
        if mode == "offline":
            folder = Path(self.wandb.dir).parent
            say(f"{stage.name}: W&B is offline; `wandb sync {os.path.relpath(folder)}` uploads this run")

    def row(self, row: Mapping[str, float | int | None]) -> None:
        """One logged step, to be written when it is its turn."""
        if not is_main():
            return
        while self._rows and self._rows[0].done():
            self._rows.popleft().result()
        self._rows.append(self._writer.submit(self._write, dict(row)))

    def answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Some of what was answered at a step, with what it was worth, as one table."""
        if answers and is_main():
            self._rows.append(self._writer.submit(self._write_answers, step, [*answers]))

    def written(self) -> None:
        """Waits until every row is where it belongs."""
        while self._rows:
            self._rows.popleft().result()

    def _write(self, row: Mapping[str, float | int | None]) -> None:
        append(self.stage.folder / "metrics.jsonl", row)
        shown = {UNITS.get(name, name): value for name, value in row.items() if value is not None}
        self._tell_wandb(lambda: self.wandb.log(shown, step=int(row["step"] or 0)))

    def _write_answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        for answer in answers:
            append(self.stage.folder / "answers.jsonl", {"step": step, **answer})
        self._tell_wandb(lambda: self.wandb.log({"answers": self._table(answers)}, step=step))

    @staticmethod
    def _table(answers: Sequence[Mapping[str, Any]]) -> Any:
        import wandb

        columns: list[str | int] = [*dict.fromkeys(chain(*answers))]
        rows = [[answer.get(str(name)) for name in columns] for answer in answers]
        return wandb.Table(columns=columns, data=rows)

    def _tell_wandb(self, act: Callable[[], object]) -> None:
        """The figures are in `metrics.jsonl` anyway: a run does not end because W&B fails."""
        if self.wandb is None:
            return
        try:
            act()
        except Exception as why:
            self.wandb = None
            say(
                f"ALARM: {self.stage.name}: W&B fails ({why!r}) and is told nothing more; the run goes on, "
                f"and its figures are in {self.stage.folder / 'metrics.jsonl'}"
            )

    def sample(self, step: int, text: str | None) -> None:
        """Something the model wrote at a step."""
        if text is None or not is_main():
            return
        say(f"{self.stage.name} at step {step}: {text!r}")
        append(self.stage.folder / "samples.jsonl", {"step": step, "text": text})
        self.samples.append([step, text])

    def checkpoint(self, path: Path) -> None:
        """Records the final checkpoint and its tokenizer as artifacts, by reference: nothing is uploaded."""
        self.written()
        if self.wandb is not None:
            self._tell_wandb(lambda: self._log_artifacts(path))

    def _log_artifacts(self, path: Path) -> None:
        import wandb

        for name, kind, target in (
            (f"{self.stage.run.name}-{self.stage.name}", "model", path / "manifest.json"),
            (f"{self.stage.run.name}-tokenizer", "tokenizer", self.stage.folder / "tokenizer.model"),
        ):
            artifact = wandb.Artifact(
                _artifact_name(name), type=kind, metadata={"path": str(target.absolute())}
            )
            # checksum=False: W&B would read every byte; our own manifest holds the sums.
            artifact.add_reference(target.absolute().as_uri(), checksum=False)
            self.wandb.log_artifact(artifact)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.written()
        self._writer.shutdown()
        if self.wandb is not None:
            import wandb

            if self.samples:
                table = wandb.Table(columns=["step", "text"], data=self.samples)
                self._tell_wandb(lambda: self.wandb.log({"samples": table}))
            self._tell_wandb(lambda: self.wandb.finish(exit_code=1 if failure else 0))


def _patience(known: Iterable[str]) -> dict[str, Any]:
    """How long W&B may wait for its server, of the settings that its version has: the GPUs wait with it."""
    return {
        name: seconds
        for name, seconds in PATIENCE.items()
        if name in known and f"WANDB_{name.upper()}" not in os.environ
    }


def chosen_mode() -> Literal["online", "offline", "disabled"]:
    """What $WANDB_MODE says; without it, online when logged in."""
    said = os.environ.get("WANDB_MODE")
    for mode in ("online", "offline", "disabled"):
        if said == mode:
            return mode
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether W&B has a key: in the environment, or in netrc ($NETRC names another file)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _artifact_name(name: str) -> str:
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in name
    )


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that is only ever appended to.

    A killed process may leave half a line at its end, and a machine that lost its power zeros within it.
    """
    if not path.is_file():
        return
    # Not splitlines: a model may have written U+2028, at which that splits, too.
    *complete, _ = path.read_bytes().split(b"\n")
    for line in complete:
        try:
            row = json.loads(line)
            whole = isinstance(row["step"], int)
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            yield row
        else:
            say(f"{path}: a line is damaged, and dropped: {line[:60]!r}")
