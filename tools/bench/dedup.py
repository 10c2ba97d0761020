"""Deduplication measured: megachat and what others use, text to removal list, one process each on one core.

    python tools/bench/dedup.py                          # the embedded corpus and planted near-duplicates
    python tools/bench/dedup.py --text corpus/*.jsonl.gz     # these texts instead

README.md beside this file says what is counted and what is not.
"""

import argparse
import functools
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.data.document import read_lines
from megachat.data.harvest import library_documents
from megachat.data.jit import available
from tools.bench import clock
from tools.bench.make_text import generated
from tools.bench.planted import Copy, chinese, neighbours, plant

RECALLS = (0.7, 0.8, 0.9)
"""Recall is that of the planted pairs at least so similar."""
ALIKE = 0.7
"""A removal is right if a document that stays is at least so similar."""
APART = 1.05
"""Time on the clock is shown where it is so many times the processor's."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A line of the tables."""

    name: str
    module: str
    """Of `tools.bench.runners`."""
    environment: str = ""
    """The folder in `.venv-bench` whose Python runs it; empty for the Python that runs this."""
    compiled: bool = False
    signed: int = 4_000_000
    """Bytes of each language that its signatures are timed with."""

    def run(self, job: str, text: Path) -> clock.Result | str:
        """What it measured; or how to install it, if it is not."""
        if remedy := clock.missing(self.environment):
            return remedy
        if self.compiled and not available():
            return "pip install 'megachat[fast]'"
        return clock.run(
            self.module, self.environment, job, text, settings={"COMPILED": str(int(self.compiled))}
        )


RIVALS = (
    Rival("megachat (numba)", "megachat", compiled=True, signed=50_000_000),
    Rival("megachat (numpy)", "megachat", signed=50_000_000),
    Rival("datasketch", "datasketch"),
    Rival("text-dedup", "text_dedup", "text-dedup"),
    Rival("datatrove", "datatrove", "datatrove", signed=500_000),
)


def main() -> int:
    """Prints both tables. Returns 3 if what was asked for by name is not installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="PATH", help="JSON Lines, also .gz or .zst"
    )
    parser.add_argument("--only", choices=[rival.name for rival in RIVALS], help="measure this one alone")
    parser.add_argument("--megabytes", type=float, default=20, help="of text to read (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of what is planted")
    arguments = parser.parse_args()
    rivals = [rival for rival in RIVALS if arguments.only in (None, rival.name)]
    try:
        texts, truth = corpus(arguments.text, arguments.megabytes * 1e6, arguments.seed)
        with tempfile.TemporaryDirectory(prefix="dedup.") as folder:
            if not removals(rivals, texts, truth, Path(folder)) and arguments.only:
                return 3
            signatures(rivals, texts, arguments.megabytes * 1e6, Path(folder))
    except (ValueError, RuntimeError) as why:
        print(f"dedup.py: {why}", file=sys.stderr)
        return 1
    return 0


def corpus(paths: Sequence[Path], limit: float, seed: int) -> tuple[list[str], list[Copy]]:
    """The texts, and the planted pairs among them: of a `_truth.jsonl` beside the files, or new ones."""
    documents = [(document.id, document.text) for document in library_documents()] if not paths else []
    documents += [row for path in paths if path.name != "_truth.jsonl" for row in rows(path)]
    texts = head((text.encode(errors="replace").decode() for _, text in documents), limit)
    truths = sorted({path.parent / "_truth.jsonl" for path in paths})
    if not any(path.exists() for path in truths):
        return plant(texts, seed=seed)
    numbers = {name: number for number, (name, _) in enumerate(documents[: len(texts)])}
    truth = [json.loads(line) for path in truths for _, line in read_lines(path)]
    return texts, [
        Copy(numbers[pair["of"]], numbers[pair["id"]], pair["kind"], pair["jaccard"])
        for pair in truth
        if pair["of"] in numbers and pair["id"] in numbers
    ]


def rows(path: Path) -> Iterator[tuple[str, str]]:
    """Ids and texts of a JSON Lines file; a line's place where it has no id."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; name JSON Lines files, such as those make_text.py writes")
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            yield str(row.get("id", f"{path}:{number}")), row["text"]
        except (ValueError, KeyError, AttributeError) as why:
            raise ValueError(f"{path}:{number}: no object with a text ({why!r}); mend the line") from None


def head(texts: Iterable[str], limit: float) -> list[str]:
    """The first texts, as many as have `limit` bytes together; at least one."""
    found: list[str] = []
    for text in texts:
        limit -= len(text.encode())
        if found and limit < 0:
            break
        found.append(text)
    return found


@functools.cache
def language_of(text: str) -> str:
    """One of en, zh."""
    return "zh" if chinese(text) else "en"


def write(path: Path, texts: Sequence[str]) -> float:
    """Writes what the runners read; returns the megabytes of the texts."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            row = {"id": str(number), "text": text, "language": language_of(text)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return sum(len(text.encode()) for text in texts) / 1e6


def told_by(rival: Rival, job: str, path: Path) -> clock.Result | str:
    """What `Rival.run` returns, with a word on the terminal while it runs."""
    if sys.stderr.isatty():
        print(f"\r{job}: {rival.name} ...{'':<20}", end="\r", file=sys.stderr, flush=True)
    return rival.run(job, path)


def removals(rivals: Sequence[Rival], texts: Sequence[str], truth: Sequence[Copy], folder: Path) -> bool:
    """Prints the table of whole deduplications; returns whether all could be run."""
    megabytes = write(path := folder / "text.jsonl", texts)
    amount = f"{len(texts):,} documents, {megabytes:.1f} MB, {len(truth):,} planted copies"
    print(f"text to removal list: {amount}")
    print(
        f"one core of {processor()}, Python {platform.python_version()}; s is processor time, the median of"
    )
    print("up to 5 rounds in 10 s; wall is time by the clock, where that is a twentieth more\n")
    found = {rival.name: told_by(rival, "removed", path) for rival in rivals}
    gone = {name: set(told["removed"]) for name, told in found.items() if not isinstance(told, str)}
    near = neighbours(texts, set[int]().union(*gone.values()), ALIKE)
    recalls = "".join(f"{f'recall {threshold}':>12}" for threshold in RECALLS)
    columns = f"{'documents/s':>12}{'MB/s':>8}{'s':>8}{'wall':>8}{'peak MB':>9}{'disk B/doc':>12}"
    print(f"{'':<18}{columns}{recalls}{'precision':>11}{'removed':>9}")
    for name, told in found.items():
        if isinstance(told, str):
            print(f"{name:<18}not installed: {told}")
            continue
        seconds, lost = told["seconds"], gone[name]
        speed = f"{len(texts) / seconds:>12,.0f}{megabytes / seconds:>8.2f}{seconds:>8.2f}{apart(told):>8}"
        room = f"{told['peak'] / 1e6:>9.0f}{per_document(told['disk'], len(texts)):>12}"
        shares = "".join(f"{share(recall(truth, lost, threshold)):>12}" for threshold in RECALLS)
        print(f"{name:<18}{speed}{room}{shares}{share(precision(near, lost)):>11}{len(lost):>9,}")
    return len(gone) == len(found)


def apart(told: clock.Result) -> str:
    """Seconds by the clock, where they are not the processor's."""
    return f"{told['wall']:.2f}" if told["wall"] > APART * told["seconds"] else ""


def per_document(size: int, documents: int) -> str:
    """Bytes on disk for each document; all is in memory where there are none."""
    return f"{size / documents:.0f}" if size else "memory"


def recall(truth: Sequence[Copy], lost: set[int], threshold: float) -> float | None:
    """The share of the planted pairs so similar of which one document is removed; None if there are none."""
    pairs = [pair for pair in truth if pair.jaccard >= threshold]
    return sum(bool({pair.original, pair.copy} & lost) for pair in pairs) / len(pairs) if pairs else None


def precision(near: Mapping[int, set[int]], lost: set[int]) -> float | None:
    """The share of the removed documents that are like one that stays; None if none is removed."""
    return sum(bool(near[number] - lost) for number in lost) / len(lost) if lost else None


def share(value: float | None) -> str:
    """A share as it is printed."""
    return "-" if value is None else f"{value:.3f}"


def signatures(rivals: Sequence[Rival], texts: Sequence[str], limit: float, folder: Path) -> None:
    """Prints the table of signatures; where `limit` is small, they are of less text, too."""
    rates: dict[str, list[str]] = {rival.name: [] for rival in rivals}
    origins = []
    for language, title in (("en", "English"), ("zh", "Chinese")):
        own = [text for text in texts if text and language_of(text) == language]
        origins.append(f"{title}: {'of the documents' if own else 'from make_text.py'}")
        own = own or generated(language, limit)
        for rival in rivals:
            # The same again if they are too few: nobody here remembers a text.
            signed = head(cycle(own), min(rival.signed, 2.5 * limit))
            megabytes = write(path := folder / "signed.jsonl", signed)
            rates[rival.name].append(rate(told_by(rival, "signatures", path), megabytes))
    print(f"\nsignatures alone, from text in memory, MB/s ({'; '.join(origins)})\n")
    print(f"{'':<18}{'English':>32}{'Chinese':>32}")
    for name, by_language in rates.items():
        print(f"{name:<18}" + "".join(f"{rate:>32}" for rate in by_language))


def rate(told: clock.Result | str, megabytes: float) -> str:
    """Megabytes a second, and of how much text; by the clock, too, where that is not the same."""
    if isinstance(told, str):
        return "not installed"
    wall = f"wall {megabytes / told['wall']:.2f}, " if apart(told) else ""
    return f"{megabytes / told['seconds']:.2f} ({wall}{megabytes:.1f} MB)"


def processor() -> str:
    """The name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
