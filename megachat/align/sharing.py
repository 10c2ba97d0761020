"""Work that the data ranks share, each a part of the items, and whose results all of them get."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from megachat.data.loader import places
from megachat.parallel.mesh import Mesh

T = TypeVar("T")
R = TypeVar("R")


def by_ranks(act: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], mesh: Mesh) -> list[R]:
    """What `act` makes of every item; of the ranks that share a model one is believed.

    Raises:
        ValueError: what went wrong on one of them, of a value or the outside world, on all: they wait for
            each other.
    """
    own = places(0, len(items), mesh.data_rank, mesh.data)
    mine: list[R] | str
    try:
        mine = [*act(items[own.start : own.stop])]
    except (ValueError, OSError) as error:
        mine = str(error)
    everybodys = mesh.gather(mine)[:: mesh.tensor]
    if wrong := next((one for one in everybodys if isinstance(one, str)), None):
        raise ValueError(wrong)
    return [*chain(*everybodys)]
