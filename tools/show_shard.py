"""Shows what a shard of tokens holds: python tools/show_shard.py runs/main/encode/train/wiki [--document 7]

PREFIX is the path without `.bin`; a folder shows every shard below it. On a terminal what is trained on is
green and control tokens are dim; elsewhere a token is a line `number id mask text`. With --verify nothing is
shown: the shards' files are compared with the sums in `manifest.json`, and status 1 says that some differ.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megachat.data.shards import Shard
from megachat.files import sha256
from megachat.tokenizer.tokenizer import FILE, Tokenizer

ENDINGS = (".mask.bin", ".bin", ".idx")
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; mistakes end it with a message and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", type=Path, metavar="PREFIX")
    parser.add_argument("--document", type=int, default=0, help="the first document to show, from 0")
    parser.add_argument("--count", type=int, default=1, help="how many to show")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model, or a folder or run that has one")
    parser.add_argument("--verify", action="store_true", help="compare the files with manifest.json")
    given = parser.parse_args(arguments)
    try:
        if given.verify:
            wrong = differing(given.prefix)
            if not wrong:
                print("all files are what their manifest says")
            parser.exit(1 if wrong else 0, "".join(f"{line}\n" for line in wrong))
        for prefix in prefixes(given.prefix):
            print("\n".join(shown(prefix, given.document, given.count, given.tokenizer)))
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    except BrokenPipeError:
        sys.stderr.close()


def prefixes(given: Path) -> list[Path]:
    """The shards that are meant."""
    if not given.is_dir():
        return [bare(given)]
    found = sorted(path.with_suffix("") for path in given.rglob("*.idx"))
    if not found:
        raise ValueError(f"{given} holds no token shards (*.idx); `megachat encode` writes them")
    return found


def bare(given: Path) -> Path:
    """A shard's path without the ending of one of its files."""
    ending = next((ending for ending in ENDINGS if given.name.endswith(ending)), "")
    return given.with_name(given.name.removesuffix(ending))


def differing(given: Path) -> list[str]:
    """The files that are not what the manifest says of them, each with what is wrong."""
    place = given.resolve() if given.is_dir() else bare(given).resolve()
    above = [folder for folder in (place, *place.parents[:2]) if entries(folder)]  # train/wiki, train, or all
    folders = above[:1] or sorted(path.parent for path in place.rglob("manifest.json"))
    wrong, known = [], False
    for folder in folders:
        for name, entry in entries(folder).items():
            prefix = folder / name
            if place != prefix and place not in prefix.parents:
                continue
            for kind, expected in entry["sha256"].items():
                path, known = Path(f"{prefix}.{kind}"), True
                if not path.is_file():
                    wrong.append(f"{path} is missing")
                elif (found := sha256(path)) != expected:
                    wrong.append(f"{path} has the sha256 {found[:12]}, and its manifest says {expected[:12]}")
    if not known:
        raise ValueError(
            f"no manifest.json at {given} or above names its files; `megachat encode` writes it beside them"
        )
    return wrong


def entries(folder: Path) -> dict[str, Any]:
    """What a folder's manifest, if it has one, says of shards."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")).get("shards", {}) if path.is_file() else {}


def shown(prefix: Path, first: int, count: int, tokenizer: Path | None = None) -> Iterator[str]:
    """A line on the shard, then its documents."""
    shard = Shard(prefix)
    words = tokenizer_of(prefix, tokenizer)
    if not 0 <= first < max(len(shard), 1):  # of a shard without documents there is the first line
        raise ValueError(f"{prefix} has documents 0 to {len(shard) - 1:,}; --document {first} is not one")
    if count < 1:
        raise ValueError(f"--count {count}: how many documents to show is 1 or more")
    mask = shard.mask
    kind = "" if mask is None else f", {int(mask.sum()):,} of them trained on"
    yield f"{prefix}: {len(shard):,} documents, {len(shard.tokens):,} tokens{kind}"
    for number in range(first, min(first + count, len(shard))):
        start, stop = shard.starts(number, number + 2).tolist()
        yield f"--- document {number}: {stop - start:,} tokens"
        tokens = shard.tokens[start:stop].tolist()
        largest = max(tokens, default=0)  # other programs write documents without tokens
        if largest >= words.vocab:
            raise ValueError(
                f"{prefix} has token {largest}, and the tokenizer only {words.vocab}: it is "
                "another one's; name the right one with --tokenizer"
            )
        trained = [None] * len(tokens) if mask is None else mask[start:stop].tolist()
        if sys.stdout.isatty():
            yield coloured(tokens, trained, words)
        else:
            for place, (token, one) in enumerate(zip(tokens, trained, strict=True)):
                yield f"{place}\t{token}\t{'-' if one is None else one}\t{text_of(token, words)!r}"


def coloured(tokens: Sequence[int], mask: Sequence[int | None], words: Tokenizer) -> str:
    """The text in one piece: characters may be several tokens."""
    parts: list[tuple[str, bytes]] = []
    for token, trained in zip(tokens, mask, strict=True):
        control = not words.bytes_of(token)
        style = (GREEN if trained else "") + (DIM if control else "")
        text = words.pieces[token].encode() if control else words.bytes_of(token)
        if parts and parts[-1][0] == style:
            parts[-1] = style, parts[-1][1] + text
        else:
            parts.append((style, text))
    return "".join(
        f"{style}{text.decode('utf-8', 'replace')}{PLAIN if style else ''}" for style, text in parts
    )


def text_of(token: int, words: Tokenizer) -> str:
    """What a token stands for; of a control token its name."""
    return words.bytes_of(token).decode("utf-8", "backslashreplace") or words.pieces[token]


def tokenizer_of(prefix: Path, given: Path | None) -> Tokenizer:
    """The tokenizer that wrote the shard: named, or that of its run, known by the sum in the manifest."""
    if given is not None:
        return Tokenizer.load(given / "tokenizer" if (given / "tokenizer").is_dir() else given)
    folders = prefix.resolve().parents[:3]  # runs/main/encode/train, runs/main/encode, runs/main
    expected = None
    for folder in folders:
        if expected is None and (folder / "manifest.json").is_file():
            expected = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("tokenizer")
    runs = [run for folder in folders if (run := inputs_of(folder))]
    for folder in [*folders, *runs]:
        for place in (folder / FILE, folder / "tokenizer" / FILE):
            if place.is_file():
                found = Tokenizer.load(place)
                if expected in (None, found.sha256):
                    return found
    raise ValueError(
        f"no tokenizer near {prefix}"
        + (f" has the sha256 {expected[:12]} that its manifest names" if expected else "")
        + "; name one with --tokenizer runs/NAME, or the path of a tokenizer.model"
    )


def inputs_of(folder: Path) -> Path | None:
    """The run that a stage took its inputs from, where `folder` is a stage's."""
    config = folder / "config.yaml"
    found = yaml.safe_load(config.read_text(encoding="utf-8")).get("inputs") if config.is_file() else None
    return Path(found) if found else None


if __name__ == "__main__":
    main()
