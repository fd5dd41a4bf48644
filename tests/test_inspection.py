"""The page of a run's trajectories: its data (see test_pages_browser.py)."""

import json

import jax
import numpy as np
import pytest
from small_logs import HOSTILE, text_of
from small_run import settings_with

from topd_jax.experiments.observe import looking_ahead, observe
from topd_jax.experiments.token_map import trajectories_of, write_page
from topd_jax.losses.near_future import divergence_mask
from topd_jax.objectives.objective import Transport
from topd_jax.training.setup import load_setup

ABOUT = {"title": "A <page>", "facts": {"student": "start & more"}}


@pytest.fixture(scope="module")
def seen(world_cache, tmp_path_factory):
    """(setup, batches) of six problems in batches of four."""
    settings = settings_with(
        world_cache, eval__batch_size=4, objective="suppress(window=4)"
    )
    setup = load_setup(settings, tmp_path_factory.mktemp("setup"))
    with jax.set_mesh(setup.mesh):
        ahead = [looking_ahead(settings)]
        batches = list(observe(settings, setup, setup.student, 6, ahead))
    return setup, batches


@pytest.fixture(scope="module")
def rows(seen):
    setup, batches = seen
    return [
        row
        for batch in batches
        for row in trajectories_of(batch, setup, window=4, is_world=True)
    ]


def test_every_objective_can_look_ahead():
    for text in (
        "n_step(window=7, detector='future_loss')",
        "topd(window=7, context='student')",
    ):
        ahead = looking_ahead(settings_with(objective=text))
        assert ahead.near_future.window == 7
        assert ahead.near_future.detector == Transport()
        assert ahead.needs_branches and not ahead.needs_student
        assert ahead.guidance is None
    assert looking_ahead(settings_with(objective="opd")).needs_branches
    with pytest.raises(ValueError, match="window=10 must not exceed rollout"):
        looking_ahead(settings_with(objective="opd", rollout__max_new_tokens=8))


def test_rows_that_fill_a_batch_do_not_move_its_percentile(seen):
    for batch in seen[1]:
        (scored,) = batch.scored
        alone = divergence_mask(scored.distance, scored.candidates)
        np.testing.assert_array_equal(scored.divergent, alone)


def test_rows_say_what_the_arrays_hold(seen, rows):
    setup, batches = seen
    assert [len(b.records) for b in batches] == [4, 2]
    assert [r["problem"] for r in rows] == [
        r["prompt"] for r in setup.test.records[:6]
    ]
    row, scored = rows[4], batches[1].scored[0]  # the second batch's first
    written = batches[1].trajectories
    ids = written.tokens[0][written.mask[0]].tolist()
    texts = [token["text"] for token in row["tokens"]]
    assert len(texts) == len(ids)
    text = "".join(texts).replace("<end>", "")
    assert text == setup.tokenizer.decode(ids)
    assert row["right"] is setup.grade(batches[1].records[:1], [text])[0]
    found = {
        at: token["candidate"]
        for at, token in enumerate(row["tokens"])
        if token["candidate"]
    }
    assert sorted(found) == sorted(scored.candidates.positions[0])
    for slot, at in enumerate(scored.candidates.positions[0]):
        assert found[at]["distance"] == pytest.approx(
            float(scored.distance[0, slot]), abs=1e-4
        )
        assert found[at]["divergent"] == scored.divergent[0, slot]
        assert found[at]["student"] == texts[at : at + 4]
        plan = np.array(found[at]["plan"])
        assert plan.shape == (len(texts[at : at + 4]), 4)
        np.testing.assert_allclose(plan.sum(1), 1.0, atol=0.01)
    losses = [token["loss"] for token in row["tokens"]]
    assert sorted(losses[at] for at in found) == sorted(losses)[-len(found) :]


def test_the_page_carries_all_and_asks_for_nothing(rows, tmp_path):
    for token in rows[0]["tokens"]:
        if token["candidate"]:
            token["candidate"]["teacher"] = [HOSTILE]
    rows[0]["problem"] = HOSTILE
    path = tmp_path / "page.html"
    write_page(rows, ABOUT, path)
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 1 and "<!--" not in page
    assert "default-src 'none'" in page
    shown = text_of(page)
    assert "A <page>" in shown and "start & more" in shown and HOSTILE in shown
    for row in rows:
        written = "".join(token["text"] for token in row["tokens"])
        assert written.replace("\n", "⏎\n") in shown


def test_inspect_from_the_command_line(trained, small_arguments, topd):
    result = json.loads(topd("inspect", *small_arguments,
                             f"--workdir={trained}", "--which=start",
                             "--count=3"))  # fmt: skip
    assert result["trajectories"] == 3 and 3 <= result["candidates"] <= 6
    text = (trained / "inspect-start.html").read_text()
    assert text.count("<article") == 3
    assert text.count("data-candidate=") == result["candidates"]
