"""How the parts of an array become its parts on another mesh (ours).

Parts are cut into pieces, each of which lies in one part on either mesh, and
pieces go in rounds: in each a device sends one and takes one at most.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Of each dimension where a part begins and ends.
Box = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """What one device sends another.

    Attributes:
      source: place of the sender, among the devices of the source.
      target: place of the receiver, among those of the target.
      cut: where the piece begins in the sender's part.
      put: where it begins in the receiver's.
    """

    source: int
    target: int
    cut: tuple[int, ...]
    put: tuple[int, ...]


class Route(NamedTuple):
    """How an array goes from one mesh to another.

    Attributes:
      held: shape of a device's part at the source.
      wanted: shape of one at the target.
      piece: shape of what is sent at once.
      rounds: of pieces; in each a device sends one and takes one at most.
    """

    held: tuple[int, ...]
    wanted: tuple[int, ...]
    piece: tuple[int, ...]
    rounds: tuple[tuple[Piece, ...], ...]


def box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Where a part begins and ends.

    Args:
      index: one slice a dimension.
      shape: of the whole array.
    """
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )


def route(source: Sequence[Box], target: Sequence[Box]) -> Route:
    """How parts become other parts of the same array, in the fewest rounds.

    Args:
      source: what each device has; all of one shape, together the array.
      target: what each shall have; all of one shape.

    Returns:
      The route; of devices that have the same, those send less that have
      more to send.
    """
    held, wanted = (
        tuple(end - begin for begin, end in boxes[0])
        for boxes in (source, target)
    )
    piece = tuple(map(math.gcd, held, wanted))
    having: dict[tuple[int, ...], list[int]] = {}
    for i, own in enumerate(source):
        for corner in _corners(own, piece):
            having.setdefault(corner, []).append(i)
    sends, pieces = [0] * len(source), []
    for i, own in enumerate(target):
        for corner in _corners(own, piece):
            # From the next of them on, where several send as much.
            sender = min(having[corner], key=sends.__getitem__)
            sends[sender] += 1
            cut, put = (_within(corner, of) for of in (source[sender], own))
            pieces.append(Piece(sender, i, cut, put))
    return Route(held, wanted, piece, _rounds(pieces))


def _within(corner: tuple[int, ...], own: Box) -> tuple[int, ...]:
    return tuple(c - begin for c, (begin, _) in zip(corner, own, strict=True))


def _corners(own: Box, piece: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Where the pieces of a part begin."""
    return itertools.product(
        *(
            range(begin, end, step or 1)
            for (begin, end), step in zip(own, piece, strict=True)
        )
    )


def _rounds(pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """As many as the busiest device has pieces (Koenig, 1916).

    An edge of a bipartite graph gets the first round in which its sender is
    free; a path that alternates between that and the receiver's first free
    round is turned over where they differ.
    """
    at: dict[tuple[str, int], dict[int, int]] = {}
    rounds: list[int] = []
    for i, p in enumerate(pieces):
        ends = (("from", p.source), ("to", p.target))
        a, b = (
            next(r for r in itertools.count() if r not in at.setdefault(e, {}))
            for e in ends
        )
        # The path from the receiver whose rounds are a, b, a, ...
        path, end, turn = [], ends[1], a
        while turn in at[end]:
            path.append(at[end][turn])
            other = pieces[path[-1]]
            both = (("from", other.source), ("to", other.target))
            end = both[end == both[0]]
            turn = b if turn == a else a
        for k in path:
            for e in (("from", pieces[k].source), ("to", pieces[k].target)):
                if at[e].get(rounds[k]) == k:
                    del at[e][rounds[k]]
        for k in path:
            rounds[k] = b if rounds[k] == a else a
            for e in (("from", pieces[k].source), ("to", pieces[k].target)):
                at[e][rounds[k]] = k
        rounds.append(a)
        for e in ends:
            at[e][a] = i
    return tuple(
        tuple(p for p, r in zip(pieces, rounds, strict=True) if r == n)
        for n in range(max(rounds, default=-1) + 1)
    )
