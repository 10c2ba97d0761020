"""datatrove's MinHash stages on files, by its local executor, with its settings: 14 bands of 8, 5 words.

English and Chinese are deduplicated apart, each with the words of its language, as FineWeb-2 does: the lines
of the input say which they are, and are dealt to a file for each beforehand. The third stage leaves a list of
what to remove; the fourth, which reads the text again and writes the rest of it, is left out.
"""

import json
import tempfile
from array import array
from contextlib import ExitStack
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
)
from datatrove.pipeline.readers import JsonlReader
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


def removed(path: Path) -> tuple[list[int], int]:
    """What the stages would remove, and the size of their signatures."""
    numbers: dict[str, list[int]] = {language: [] for language in LANGUAGES}
    gone: list[int] = []
    size = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with path.open(encoding="utf-8") as file, ExitStack() as stack:
            files = {
                language: stack.enter_context((folder / f"{language}.jsonl").open("w", encoding="utf-8"))
                for language in LANGUAGES
            }
            for number, line in enumerate(file):
                row = json.loads(line)
                if row["text"]:  # its reader passes over an empty one without counting it
                    files[row["language"]].write(line)
                    numbers[row["language"]].append(number)
        for language, own in numbers.items():
            if own:
                places, some = removed_in(language, folder / f"{language}.jsonl", folder / language)
                gone += [own[place] for place in places]
                size += some
    return gone, size


def removed_in(language: str, path: Path, folder: Path) -> tuple[list[int], int]:
    """Which documents of a file in one language would be removed, and the size of the signatures."""
    config = MinhashConfig()
    bands, pairs, clusters = (str(folder / name) for name in ("bands", "pairs", "clusters"))
    reader = JsonlReader(str(path.parent), glob_pattern=path.name)
    jobs = [
        (1, [reader, MinhashDedupSignature(bands, config, LANGUAGES[language])]),
        (config.num_buckets, [MinhashDedupBuckets(bands, pairs, config=config)]),
        (1, [MinhashDedupCluster(pairs, clusters, config=config)]),
    ]
    for number, (tasks, pipeline) in enumerate(jobs):
        LocalPipelineExecutor(pipeline, tasks, workers=1, logging_dir=str(folder / f"log{number}")).run()
    places = array("I")
    for listed in Path(clusters).glob("*.remove"):  # one at most: there was one task
        places.frombytes(listed.read_bytes())
    return places.tolist(), sum(file.stat().st_size for file in Path(bands).rglob("*.sig"))


if __name__ == "__main__":
    logger.remove()
    serve(removed, signatures)
