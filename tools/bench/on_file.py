"""What a runner is told: fields that pass as a file from a bench to a program in another environment.

Only Python's own library may be imported here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T", bound="OnFile")


@dataclass(frozen=True, kw_only=True)
class OnFile:
    """Fields of plain values, which a dataclass below adds."""

    @classmethod
    def read(cls: type[T], path: str | Path) -> T:
        """From the file that `write` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
