"""What an attacker hides in a file of data: code that runs when somebody unpickles it."""

import os
from pathlib import Path
from typing import Any


class Payload:
    """Unpickled by someone careless, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)
