"""Data sets of the Hugging Face Hub, or folders of the same shape, read as a stream."""

import functools
import os
from collections.abc import Iterator
from typing import Any

from megachat.data.document import Broken, Document, need
from megachat.data.sources.base import Keys, Outside, Part


class HuggingFace(Keys, Outside):
    """A data set by its name, streamed as `datasets.load_dataset` does: nothing is kept on disk.

    Its shards are the parts: its files, as a rule.
    A shard that is damaged ends the work, whatever `on_error` says; a row without text does not.
    """

    dataset: str
    """Like HuggingFaceFW/fineweb-edu, or a local folder."""
    config: str | None
    """Which of its configurations; null: the default one."""
    folder: str | None
    """Read only what is below this folder of it (`data_dir`); null: everything."""
    split: str
    """Which of its splits, most often train."""
    revision: str | None
    """A commit or tag: without one the data may change between two runs."""

    def parts(self) -> list[Part]:
        shards = self._stream().num_shards
        return [Part(f"shard-{number:05}-of-{shards:05}", size=0) for number in range(shards)]

    def records(self, part: Part) -> Iterator[Document | Broken]:
        return self.documents_of(self._rows(part), part, self.name)

    def _rows(self, part: Part) -> Iterator[tuple[int, Any]]:
        _, number, _, shards = part.name.split("-")
        stream, row = self._stream(), 0
        try:
            for row, record in enumerate(stream.shard(num_shards=int(shards), index=int(number)), 1):
                if row == 1 and (missing := [key for key in self.keys if key not in record]):
                    raise ValueError(f"no column {missing[0]!r} among {list(record)}; mend the corpus")
                yield row, {key: record[key] for key in self.keys}
        except Exception as why:  # of any reader that `datasets` uses, or of the network
            raise ValueError(f"{self.dataset}/{part.name}:{row + 1}: cannot be read ({why})") from why

    def _stream(self) -> Any:
        return _load(self.dataset, self.config, self.folder, self.split, self.revision, tuple(self.keys))


@functools.lru_cache(maxsize=8)
def _load(
    dataset: str,
    config: str | None,
    folder: str | None,
    split: str,
    revision: str | None,
    keys: tuple[str, ...],
) -> Any:
    """The stream; cached, because the Hub is asked for the names of the files, and each part would ask."""
    before = os.environ.get("USE_TORCH")
    # Looked at on import. With torch, every process that cleans text would load it.
    os.environ["USE_TORCH"] = "0"
    try:
        datasets = need("datasets")
    finally:
        if before is None:
            del os.environ["USE_TORCH"]
        else:
            os.environ["USE_TORCH"] = before
    try:
        builder = datasets.load_dataset_builder(dataset, config, data_dir=folder, revision=revision)
        stream = builder.as_streaming_dataset(split=split)
        # Parquet need not fetch columns that nobody wants. Where one that is wanted is missing, the whole row
        # is, to say what there is.
        if hasattr(builder.config, "columns") and {*keys} < {*(stream.features or ())}:
            builder.config.columns = list(dict.fromkeys(keys))
            stream = builder.as_streaming_dataset(split=split)
        return stream
    except (OSError, ValueError, ConnectionError) as why:  # DatasetNotFoundError is a FileNotFoundError
        raise ValueError(
            f"dataset {dataset!r}: {why}. One that is gated wants you to accept its terms and `hf auth login`"
        ) from None
