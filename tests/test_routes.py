"""Routes of arrays between meshes; test_processes sends along them."""

import itertools

import numpy as np
import pytest

from topd_jax.parallel.routes import route


def split(shape, ways):
    """Boxes of an array cut into equal parts."""
    sides = [
        [(i * n // w, (i + 1) * n // w) for i in range(w)]
        for n, w in zip(shape, ways, strict=True)
    ]
    return list(itertools.product(*sides))


def slices(begin, sizes):
    return tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))


def follow(way, shape, source, target):
    """What the parts of the target are, when the route has been gone."""
    table = np.arange(np.prod(shape)).reshape(shape)
    held = [table[tuple(slice(*side) for side in box)] for box in source]
    made = [np.full(way.wanted, -1) for _ in target]
    for pieces in way.rounds:
        assert len({p.source for p in pieces}) == len(pieces)
        assert len({p.target for p in pieces}) == len(pieces)
        for p in pieces:
            sent = held[p.source][slices(p.cut, way.piece)]
            made[p.target][slices(p.put, way.piece)] = sent
    for box, part in zip(target, made, strict=True):
        np.testing.assert_array_equal(
            part, table[tuple(slice(*side) for side in box)]
        )


@pytest.mark.parametrize(
    ("source", "target", "rounds", "piece"),
    [
        ((4, 1), (4, 1), 1, (6, 8)),  # beside each other
        ((1, 1), (4, 1), 4, (6, 8)),  # one has it all
        ((4, 1), (1, 1), 4, (6, 8)),  # one wants it all
        ((8, 1), (1, 8), 8, (3, 1)),  # every one of every other
        ((12, 1), (4, 1), 3, (2, 8)),  # put together
        ((4, 1), (12, 1), 3, (2, 8)),  # cut
        ((3, 1), (2, 1), 3, (4, 8)),  # neither lies in the other
        ((2, 4), (4, 2), 2, (6, 2)),
    ],
)
def test_a_route_takes_the_fewest_rounds(source, target, rounds, piece):
    shape = (24, 8)
    boxes = split(shape, source), split(shape, target)
    way = route(*boxes)
    assert (len(way.rounds), way.piece) == (rounds, piece)
    follow(way, shape, *boxes)


def test_those_that_have_the_same_share_the_sending():
    whole = split((6, 4), (1, 1))
    for senders, receivers, rounds in ((4, 4, 1), (4, 8, 2), (3, 4, 2)):
        way = route(whole * senders, whole * receivers)
        assert len(way.rounds) == rounds
        follow(way, (6, 4), whole * senders, whole * receivers)


@pytest.mark.parametrize("seed", range(5))
def test_any_layout_is_as_fast_as_its_busiest_device(seed):
    draw = np.random.default_rng(seed)
    shape = (24, 36)
    ways = [draw.choice([1, 2, 3, 4, 6], 2) for _ in range(2)]
    boxes = [split(shape, w) * int(draw.integers(1, 4)) for w in ways]
    boxes = [[b[i] for i in draw.permutation(len(b))] for b in boxes]
    way = route(*boxes)
    follow(way, shape, *boxes)
    pieces = [p for r in way.rounds for p in r]
    busiest = max(
        max(np.bincount([p.source for p in pieces])),
        max(np.bincount([p.target for p in pieces])),
    )
    assert len(way.rounds) == busiest


def test_nothing_is_sent_of_nothing():
    empty = [((0, 0), (0, 3))]
    assert route(empty, empty * 2).rounds == ()
