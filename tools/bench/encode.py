"""Encoding measured: megachat's stage on one core and on two, and programs that turn text into ids.

    python tools/bench/encode.py                             # the embedded corpus
    python tools/bench/encode.py --text corpus/*.jsonl.gz    # these texts instead

README.md beside this file says what is counted and what is not.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.config import compose
from megachat.data.clean import PER_SHARD
from megachat.data.conversations import share
from megachat.data.document import Document, write_shard
from megachat.data.harvest import library_documents
from megachat.data.shards import read_split
from megachat.files import write_json
from megachat.tokenizer.encode import SPLITS
from megachat.tokenizer.tokenizer import FILE, SPACE, Tokenizer
from megachat.tokenizer.tokenizer_json import tokenizer_json
from megachat.tokenizer.train import sample, train
from tools.bench import clock
from tools.bench.dedup import head, processor, rows

SOURCE = "text"
LEARNT = 20_000_000
"""Bytes of text that the tokenizer is learnt from."""
FEW = 20
"""Texts that a stage takes no time to encode: what is left is its start."""


@dataclass(frozen=True)
class Prepared:
    """What all encode, in a folder."""

    folder: Path
    documents: list[Document]
    size: int
    """Bytes of text."""
    validation: float
    """The default share, or as much as it takes to get a document."""

    @property
    def tokenizer(self) -> Path:
        return self.folder / "all" / "tokenizer" / FILE

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"


@dataclass(frozen=True, slots=True)
class Program:
    """A line of the table: texts in memory to ids in memory, on one core."""

    name: str
    environment: str = ""
    """The folder in `.venv-bench` whose Python runs it; empty for the Python that runs this."""
    cores: int = 1

    def missing(self) -> str:
        """How to install it; "" if it is there."""
        return clock.missing(self.environment)

    def run(self, prepared: Prepared, repeat: int) -> clock.Result:
        """What it measured."""
        return clock.run(self.name, self.environment, prepared.tokenizer, prepared.text)


@dataclass(frozen=True, slots=True)
class Stage:
    """A line of the table: `megachat encode` as a user starts it, compressed text to token shards."""

    encoder: str
    cores: int

    @property
    def name(self) -> str:
        return f"megachat ({self.encoder})"

    def missing(self) -> str:
        """How to install it; "" if it is there."""
        there = importlib.util.find_spec(self.encoder) is not None
        return "" if there else "pip install 'megachat[fast]'"

    def run(self, prepared: Prepared, repeat: int) -> clock.Result:
        """Medians of `repeat` runs, what it takes to start, and the digests of what the last one wrote."""
        few = [self._once(prepared, "few", f"few{number}")[0] for number in range(repeat)]
        times = [self._once(prepared, "all", f"all{number}") for number in range(repeat)]
        folder = self._run(prepared, f"all{repeat - 1}") / "encode"
        wall, seconds = (median(column) for column in zip(*times, strict=True))
        return {
            "wall": wall,
            "seconds": seconds,
            "start": median(few),
            "digests": list(written(folder, prepared)),
            "fallen": fallen(folder, self.encoder),
        }

    def _run(self, prepared: Prepared, name: str) -> Path:
        return prepared.folder / f"{self.encoder}-{self.cores}-{name}"

    def _once(self, prepared: Prepared, inputs: str, name: str) -> tuple[float, float]:
        """Seconds by the clock and of the processors, from the command to its end."""
        settings = [f"encoder={self.encoder}", f"executor.processes={self.cores}"]
        settings += [f"validation={prepared.validation}", f"inputs={prepared.folder / inputs}"]
        before, started = clock.processor_time(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "megachat", "encode", f"run={self._run(prepared, name)}", *settings],
            cwd=prepared.folder,
            env=os.environ | {"PYTHONPATH": str(clock.ROOT)},
            preexec_fn=self._on_cores,
            capture_output=True,
            text=True,
            check=False,
        )
        wall, seconds = time.perf_counter() - started, clock.processor_time() - before
        if done.returncode:
            raise RuntimeError(f"{self.name} failed:\n{done.stderr[-4000:]}")
        return wall, seconds

    def _on_cores(self) -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-self.cores :])


LINES = (
    Program("sentencepiece"),
    Program("tokenizers", "tokenizers"),
    Program("gigatoken", "gigatoken"),
    Stage("sentencepiece", 1),
    Stage("sentencepiece", 2),
    Stage("gigatoken", 1),
    Stage("gigatoken", 2),
)


def main() -> int:
    """Prints the table. Returns 3 if what was asked for by name is not installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="PATH", help="JSON Lines, also .gz or .zst"
    )
    parser.add_argument("--only", choices=[*dict.fromkeys(line.name for line in LINES)])
    parser.add_argument("--megabytes", type=float, default=40, help="of text, at most (default: 40)")
    parser.add_argument("--vocab", type=int, default=16_000, help="tokens (default: 16,000)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs of a stage; the median counts (default: 3)"
    )
    arguments = parser.parse_args()
    first = LINES[0]
    # The first is what the others are measured by.
    lines = [line for line in LINES if line is first or arguments.only in (None, line.name)]
    absent = {line.name: remedy for line in lines if (remedy := line.missing())}
    if arguments.only in absent:
        print(f"{arguments.only:<26}not installed: {absent[arguments.only]}")
        return 3
    try:
        with tempfile.TemporaryDirectory(prefix="encode.") as folder:
            prepared = prepare(Path(folder), arguments.text, arguments.megabytes * 1e6, arguments.vocab)
            table(lines, absent, prepared, arguments.repeat)
    except (ValueError, RuntimeError) as why:
        print(f"encode.py: {why}", file=sys.stderr)
        return 1
    return 0


def prepare(folder: Path, paths: Sequence[Path], limit: float, vocab: int) -> Prepared:
    """Writes what the stages before `encode` leave, and the same for the other programs."""
    found = (
        (text for path in paths for _, text in rows(path))
        if paths
        else (one.text for one in library_documents())
    )
    # A real U+2581 is the one thing that megachat keeps and a tokenizer.json does not: nobody gets it.
    texts = head(
        (text.encode(errors="replace").decode() for text in found if text and SPACE not in text), limit
    )
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    documents = [Document(str(number), text, SOURCE) for number, text in enumerate(texts)]
    tokenizer = train([one.text for one in sample(documents, LEARNT, 0)], vocab, 0.9995, 1)
    files = [*shards(documents)]
    short = few(documents)
    # In as many files, for each process to start.
    dealt = [short[place :: len(files)] for place in range(min(len(files), len(short)))]
    for inputs, some in {"all": files, "few": dealt}.items():
        for stage in ("clean", "tokenizer"):
            (folder / inputs / stage).mkdir(parents=True)
            write_json(folder / inputs / stage / "done.json", {"fingerprint": "made by encode.py"})
        for number, shard in enumerate(some):
            write_shard(folder / inputs / "clean" / f"text-{number:05}.jsonl.zst", shard)
        tokenizer.save(folder / inputs / "tokenizer" / FILE)
    (folder / "all" / "tokenizer" / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    report(documents, tokenizer)
    # A fraction more than the least share of any, lest a short corpus have none.
    least = min(share(document.id) for document in documents) + 1e-9
    size = sum(len(text.encode()) for text in texts)
    return Prepared(folder, documents, size, max(compose("encode")["validation"], least))


def report(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    """Prints what is encoded where."""
    size = sum(len(document.text.encode()) for document in documents)
    about = f"{len(documents):,} documents, {size / 1e6:.1f} MB in {len([*shards(documents)])} files"
    print(f"text to ids: {about}; a vocabulary of {tokenizer.vocab:,}")
    print(f"{processor()}, Python {platform.python_version()}; s is time by the clock, medians\n", flush=True)


def shards(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in files as large as `megachat clean` makes them."""
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += len(document.text.encode())
        if size >= PER_SHARD:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def few(documents: Sequence[Document]) -> list[Document]:
    """Short ones, behind one that is for validation if any is."""
    first = min(documents, key=lambda document: share(document.id))
    return [
        first,
        *sorted((one for one in documents if one is not first), key=lambda one: len(one.text))[:FEW],
    ]


def written(folder: Path, prepared: Prepared) -> Iterator[str]:
    """Digests of what `encode` wrote for each document, without `bos` and `eos`."""
    own = {}
    for split in SPLITS:
        shard = read_split(folder, split)[SOURCE]
        own[split] = iter(np.split(np.asarray(shard.tokens), shard.documents[1:-1]))
    for document in prepared.documents:
        ids = next(own[SPLITS[share(document.id) < prepared.validation]])
        yield clock.digest(ids[1:-1].tolist())


def fallen(folder: Path, encoder: str) -> int:
    """How many files of text another encoder did."""
    told = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    return sum(count for name, count in told["encoders"].items() if name != encoder)


def table(lines: Sequence[Program | Stage], absent: dict[str, str], prepared: Prepared, repeat: int) -> None:
    """Measures and prints line by line."""
    columns = f"{'cores':>6}{'s':>8}{'processor s':>13}{'MB/s a core':>13}{'M tokens/s a core':>19}"
    print(f"{'':<26}{columns}{'x sentencepiece':>17}{'start s':>9}{'x after it':>12}")
    base: Any = None
    for line in lines:
        if line.name in absent:
            print(f"{line.name:<26}not installed: {absent[line.name]}")
            continue
        if line.cores > len(os.sched_getaffinity(0)):
            print(f"{line.name:<26}{line.cores:>6}  needs as many cores")
            continue
        told = line.run(prepared, repeat)
        base = base or told
        print(f"{line.name:<26}{line.cores:>6}{figures(told, base, prepared.size, line.cores)}", flush=True)


def figures(told: clock.Result, base: clock.Result, size: int, cores: int) -> str:
    """What a line says; no rate where the ids are not sentencepiece's."""
    differing = sum(one != other for one, other in zip(told["digests"], base["digests"], strict=True))
    if differing:
        return f"  not counted: {differing:,} of {len(base['digests']):,} texts have other ids"
    each = told["wall"] * cores * 1e6
    rates = f"{size / each:>13.2f}{base['tokens'] / each:>19.3f}{base['wall'] / told['wall']:>17.2f}"
    if "start" in told:
        left = told["wall"] - told["start"]
        rates += f"{told['start']:>9.2f}" + (f"{base['wall'] / left:>12.2f}" if left > 0 else f"{'-':>12}")
    fallen = f"  {told['fallen']} files fell back" if told.get("fallen") else ""
    return f"{told['wall']:>8.2f}{told['seconds']:>13.2f}{rates}{fallen}"


if __name__ == "__main__":
    sys.exit(main())
