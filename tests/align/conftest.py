"""One folder to start from for all tests of alignment: nothing writes to it."""

from pathlib import Path

import pytest

from tests.align import tiny


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a model that knows nothing in place of SFT's, and a reward model in place of RM's."""
    return tiny.make(tmp_path_factory.mktemp("align") / "inputs")
