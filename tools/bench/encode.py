"""How fast text becomes tokens, on one core: python tools/bench/encode.py [--text PATH...] [--only NAME]

Every row reads the same texts with the same tokenizer, learnt from them first; the last column says in how
many of them the ids are not sentencepiece's. Time is the processor's, of this process, held to one core; the
best of three. Text is the Python standard library (megachat's embedded corpus), or JSON lines with a key
`text`, .gz and .zst, too. A program that is not there has `not installed` in its row; asked for alone with
--only, it ends the bench with status 3.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megachat.data.document import SHARDS, Document, read_lines, write_documents
from megachat.data.harvest import library_documents
from megachat.data.shards import Shard
from megachat.tokenizer.encode import EncodeTexts
from megachat.tokenizer.encoders import Name
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from megachat.tokenizer.tokenizer_json import tokenizer_json
from megachat.tokenizer.train import sample, train

ROWS = (
    "sentencepiece",
    "megachat tokenizer",
    "encode sentencepiece",
    "encode gigatoken",
    "gigatoken",
    "tokenizers",
)
Ids = list[list[int]]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", nargs="+", type=Path, help="files of JSON lines; the embedded corpus if absent"
    )
    parser.add_argument("--only", choices=ROWS, help="one row alone")
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--megabytes", type=float, default=10, help="of text, at most")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    one_core()
    documents = texts_of(given.text, int(given.megabytes * 1e6))
    texts = [document.text for document in documents]
    size = sum(len(text.encode()) for text in texts)
    words = train([one.text for one in sample(documents, 20_000_000, 0)], given.vocab, 0.9995, 1)
    print(f"{len(texts):,} texts, {size / 1e6:.1f} MB, {words.vocab:,} tokens; one core", file=sys.stderr)
    right = words.encode_many(texts)
    count = sum(map(len, right))
    print(f"{'':<22}{'MB/s':>8}{'M tokens/s':>12}{'times':>8}{'texts that differ':>20}")
    first = 0.0
    for name in [given.only] if given.only else ROWS:
        try:
            with tempfile.TemporaryDirectory() as folder:
                seconds, differing = measured(name, words, documents, right, given.repeat, Path(folder))
        except ImportError:
            print(f"{name:<22}not installed")
            if given.only:
                sys.exit(3)
            continue
        first = first or seconds
        rates = f"{size / seconds / 1e6:8.2f}{count / seconds / 1e6:12.3f}{first / seconds:8.2f}"
        print(f"{name:<22}{rates}{differing:20d}")


def measured(
    name: str, words: Tokenizer, documents: list[Document], right: Ids, repeat: int, folder: Path
) -> tuple[float, int]:
    """Seconds of the best run of one row, and how many texts have other ids than sentencepiece gives them."""
    texts = [document.text for document in documents]
    if name.startswith("encode "):
        kind = name.removeprefix("encode ")
        if kind == "gigatoken":
            import gigatoken  # noqa: F401
        prepare(folder, words, documents)
        seconds = min(stage(folder, kind) for _ in range(repeat))  # type: ignore[arg-type]
        found = read_back(folder, len(texts))
    else:
        run = program(name, words)
        run(texts[:10])
        seconds, found = min((clock(lambda: run(texts)) for _ in range(repeat)), key=lambda item: item[0])
    return seconds, sum(list(ids) != other for ids, other in zip(found, right, strict=True))


def program(name: str, words: Tokenizer) -> Callable[[Sequence[str]], Any]:
    """What encodes a list of texts."""
    if name == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=words.model)
        return lambda texts: processor.encode(list(texts), num_threads=1)
    if name == "megachat tokenizer":
        return lambda texts: Tokenizer(words.model).encode_many(texts)  # a new one: it remembers words
    if name == "gigatoken":
        import gigatoken

        backend = gigatoken.Tokenizer.from_json(tokenizer_json(words))
        return lambda texts: backend.encode_batch_list([text.encode() for text in texts], parallel=False)
    import tokenizers

    other = tokenizers.Tokenizer.from_str(tokenizer_json(words))
    return lambda texts: [one.ids for one in other.encode_batch(list(texts))]


def prepare(folder: Path, words: Tokenizer, documents: list[Document]) -> None:
    """Clean text and a tokenizer, as the stages before leave them."""
    write_documents(folder / "clean", documents, per_shard=10_000)
    words.save(folder / FILE)


def stage(folder: Path, kind: Name) -> float:
    """Seconds from compressed text to shards on disk, as a process of `encode` that has started takes.

    One text in a hundred is compared, and the first of each batch.
    """
    texts = tuple(sorted((folder / "clean").glob(SHARDS)))
    step = EncodeTexts("encode", folder / "parts", len(texts), folder / FILE, kind, 0.01, 1e-12, texts)
    step.folder.mkdir(exist_ok=True)
    assert step.fast  # made before the clock starts
    seconds, records = clock(lambda: [step.work(task) for task in range(step.tasks)])
    assert all(record["encoder"] == kind for record in records), records
    return seconds


def read_back(folder: Path, count: int) -> Ids:
    """What `encode` wrote, without `bos` and `eos`, in the order of the text (there is one source)."""
    shards = [Shard(path.with_suffix("")) for path in sorted((folder / "parts").rglob("*.idx"))]
    rows = [row for shard in shards for row in np.split(np.asarray(shard.tokens), shard.documents[1:-1])]
    assert len(rows) == count
    return [row[1:-1].tolist() for row in rows]


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time of this process, and what came out."""
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


def one_core() -> None:
    """Holds this process, and the threads of libraries that start later, to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ.update({"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"})


def texts_of(paths: list[Path] | None, most: int) -> list[Document]:
    """The first documents of `most` bytes, all of one source."""
    found: list[Document] = []
    lines = (json.loads(line)["text"] for path in paths or [] for _, line in read_lines(path))
    for number, text in enumerate(lines if paths else (one.text for one in library_documents())):
        most -= len(text.encode())
        if found and most < 0:
            break
        found.append(Document(f"{number}", text, "text"))
    if not found:
        raise SystemExit(f"no text in {', '.join(map(str, paths or []))}")
    return found


if __name__ == "__main__":
    main()
