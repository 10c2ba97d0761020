"""datatrove's four MinHash stages on files, by its local executor, with its settings: 14 bands of 8, 5 words.

English and Chinese are deduplicated apart, each with the words of its language, as FineWeb-2 does: the lines
of the input say which they are. The fourth stage's `exclusion_writer` is what names the documents removed.
"""

import json
import tempfile
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from loguru import logger

from tools.bench.clock import serve

LANGUAGES = {"en": "eng", "zh": "zho_Hani"}
"""The input's names of languages, and datatrove's."""


def signatures(texts: list[str]) -> None:
    """The signature of each text, by the first stage's own methods; all texts are in one language."""
    language = LANGUAGES["zh" if any("\u4e00" <= character <= "\u9fff" for character in texts[0]) else "en"]
    with tempfile.TemporaryDirectory() as folder:
        stage = stages.setdefault(language, MinhashDedupSignature(folder, MinhashConfig(), language))
        for text in texts:
            found = stage.get_shingles(text)
            if found.size:
                stage.get_signature(found)


stages: dict[str, MinhashDedupSignature] = {}
"""Kept from the warm-up, since their tokenizers take long to load."""


def removed(path: Path) -> list[int]:
    """What the four stages remove."""
    with path.open(encoding="utf-8") as file:
        present = {json.loads(line)["language"] for line in file}
    numbers: list[int] = []
    for language in sorted(present):
        with tempfile.TemporaryDirectory() as folder:
            numbers += removed_in(language, path, Path(folder))
    return numbers


def removed_in(language: str, path: Path, folder: Path) -> list[int]:
    """What the four stages remove of the documents in one language."""
    config = MinhashConfig()
    bands, pairs, clusters, gone = (str(folder / name) for name in ("bands", "pairs", "clusters", "gone"))
    own = [
        JsonlReader(str(path.parent), glob_pattern=path.name),
        LambdaFilter(lambda document: document.metadata["language"] == language),
    ]
    jobs = [
        (1, [*own, MinhashDedupSignature(bands, config, LANGUAGES[language])]),
        (config.num_buckets, [MinhashDedupBuckets(bands, pairs, config=config)]),
        (1, [MinhashDedupCluster(pairs, clusters, config=config)]),
        (
            1,
            [
                *own,
                MinhashDedupFilter(clusters, JsonlWriter(gone, compression=None)),
                JsonlWriter(str(folder / "kept"), compression=None),
            ],
        ),
    ]
    for number, (tasks, pipeline) in enumerate(jobs):
        LocalPipelineExecutor(pipeline, tasks, workers=1, logging_dir=str(folder / f"log{number}")).run()
    found = []
    for written in Path(gone).glob("*.jsonl"):
        with written.open(encoding="utf-8") as file:
            found += [int(json.loads(line)["id"]) for line in file]
    return found


if __name__ == "__main__":
    logger.remove()
    serve(removed, signatures)
