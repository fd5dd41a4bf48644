"""The probe of section 2.1: which positions, and what is said of them."""

import json

import numpy as np
import pytest
from conftest import EOS, make_trajectories
from matplotlib import image

from topd_jax.experiments import probe
from topd_jax.experiments.observe import Observed
from topd_jax.experiments.probe import GROUPS, ranked, report
from topd_jax.objectives.objective import NearFuture, Objective
from topd_jax.types import Candidates, Scored


def group(loss, distance):
    return {"loss": np.array(loss, np.float32),
            "distance": np.array(distance, np.float32)}  # fmt: skip


FOUND = {
    "high": group([1.0, 2.0, 3.0, 4.0], [0.1, 0.5, 0.3, 0.9]),
    "random": group([0.5, 0.6], [0.2, 0.4]),
    "low": group([0.0, 0.0, 0.0, 0.1, 0.1], [0.0, 0.1, 0.2, 0.4, 0.8]),
}


def test_the_numbers_by_hand():
    found = report(FOUND)
    assert found["count"] == {"high": 4, "random": 2, "low": 5}
    assert found["median"] == pytest.approx(
        {"high": 0.4, "random": 0.3, "low": 0.2}
    )
    assert found["quartiles"]["low"] == pytest.approx([0.1, 0.4])
    # Below 0.4 lie 0.1 and 0.3.
    assert found["threshold"] == pytest.approx(0.4)
    assert found["false_alarm_fraction"] == 0.5
    # Deviations -1.5 -0.5 0.5 1.5 and -.35 .05 -.15 .45; ranks 1 3 2 4.
    assert found["pearson"] == pytest.approx(1.1 / np.sqrt(5 * 0.35), abs=1e-5)
    assert found["spearman"] == pytest.approx(0.8)


def test_no_correlation_where_nothing_varies():
    alike = {**FOUND, "high": group([1.0, 1.0, 1.0], [0.1, 0.2, 0.3])}
    assert report(alike)["spearman"] is report(alike)["pearson"] is None
    json.dumps(report(alike), allow_nan=False)


def test_where_all_are_cut_off_is_said():
    none = Candidates(np.zeros((1, 1), int), np.zeros((1, 1), bool))
    scored = Scored(
        None, None, np.zeros((1, 4)), candidates=none, distance=np.zeros((1, 1))
    )
    seen = Observed([], make_trajectories(rows=1), [scored] * len(GROUPS))
    with pytest.raises(ValueError, match="raise rollout.max_new_tokens or"):
        probe.collect([seen])


def test_positions_are_ranked_three_ways():
    written = make_trajectories(rows=6)
    tokens, mask = written.tokens, written.mask
    draw = np.random.default_rng(0).random
    loss, uniforms = draw((2, *tokens.shape), np.float32)
    ahead = Objective(near_future=NearFuture(window=4, branch_fraction=0.5))
    objectives = ranked(ahead, (EOS,))
    assert all(o.branch_fraction == 1 and o.draws for o in objectives)
    high, lot, low = (
        np.asarray(o.near_future.ranking(loss, tokens, mask, uniforms))
        for o in objectives
    )
    kept = np.isfinite(high)
    for score in (lot, low):
        np.testing.assert_array_equal(np.isfinite(score), kept)
    np.testing.assert_array_equal(high[kept], loss[kept])
    np.testing.assert_array_equal(low[kept], -loss[kept])
    np.testing.assert_array_equal(lot[kept], uniforms[kept])
    # A row that ended has all its positions, one that was cut off lacks 3.
    lengths, cut = np.asarray(mask).sum(1), np.asarray(written.truncated)
    assert cut.any() and not cut.all()
    usable = (kept & np.asarray(mask)).sum(1)
    np.testing.assert_array_equal(usable, lengths - 3 * cut)


def test_probe_from_the_command_line(trained, small_arguments, topd):
    found = json.loads(topd("probe", *small_arguments, f"--workdir={trained}",
                            "--which=start", "--count=99"))  # fmt: skip
    assert found["prompts"] == 8  # there are no more
    assert found["loss"]["high"] > found["loss"]["random"]
    assert found["loss"]["random"] > found["loss"]["low"]
    assert image.imread(found["figure"]).std() > 0.01
    written = json.loads((trained / "probe-start" / "probe.json").read_text())
    assert written["median"] == found["median"]
    positions = written["positions"]["high"]
    assert len(positions["loss"]) == found["count"]["high"] > 0
    assert np.median(positions["distance"]) == pytest.approx(
        found["median"]["high"]
    )
