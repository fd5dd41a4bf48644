"""The page of a run's trajectories: its data (see test_pages_browser.py)."""

import json

import jax
import numpy as np
import pytest
from html_page import Page
from small_run import settings_with

from topd_jax.experiments.observe import looking_ahead, observe
from topd_jax.experiments.token_map import trajectories_of, write_page
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


def test_rows_say_what_the_arrays_hold(seen, rows):
    setup, batches = seen
    assert [len(b.records) for b in batches] == [4, 2]
    assert [r["problem"] for r in rows] == [
        r["prompt"] for r in setup.test.records[:6]
    ]
    row, scored = rows[4], batches[1].scored[0]  # the second batch's first
    written = batches[1].trajectories
    count = int(written.mask[0].sum())
    assert len(row["tokens"]) == len(row["loss"]) == len(row["truth"]) == count
    ids = written.tokens[0][:count].tolist()
    text = "".join(row["tokens"]).replace("<end>", "")
    assert text == setup.tokenizer.decode(ids)
    assert row["right"] is setup.grade(batches[1].records[:1], [text])[0]
    for slot, found in enumerate(row["candidates"]):
        at = scored.candidates.positions[0, slot]
        assert found["at"] == at
        assert found["distance"] == pytest.approx(
            float(scored.distance[0, slot]), abs=1e-4
        )
        assert found["divergent"] == scored.divergent[0, slot]
        assert found["student"] == row["tokens"][at : at + 4]
        plan = np.array(found["plan"])
        assert plan.shape == (len(found["student"]), len(found["teacher"]))
        np.testing.assert_allclose(plan.sum(1), 1.0, atol=0.01)
    losses = [row["loss"][c["at"]] for c in row["candidates"]]
    assert sorted(losses) == sorted(row["loss"])[-len(losses) :]


def test_the_page_carries_all_and_asks_for_nothing(rows, tmp_path):
    hostile = "</script><!--<b>&\u2028"
    candidate = dict(rows[0]["candidates"][0], teacher=[hostile])
    rows = [dict(rows[0], problem=hostile, candidates=[candidate]), *rows[1:]]
    path = tmp_path / "page.html"
    write_page(rows, ABOUT, path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("</script>") == 1 and "<!--" not in text
    assert page.addresses == ["data:,"]
    assert "default-src 'none'" in text
    assert "A <page>" in page.text and "start & more" in page.text
    assert hostile in page.text
    for row in rows:
        written = "".join(row["tokens"]).replace("\n", "⏎\n")
        assert written in page.text
    assert text.count("data-candidate=") == sum(
        len(row["candidates"]) for row in rows
    )


def test_inspect_from_the_command_line(trained, small_arguments, topd):
    result = json.loads(topd("inspect", *small_arguments,
                             f"--workdir={trained}", "--which=start",
                             "--count=3"))  # fmt: skip
    assert result["trajectories"] == 3 and 3 <= result["candidates"] <= 6
    text = (trained / "inspect-start.html").read_text()
    assert text.count("<article") == 3
    assert text.count("data-candidate=") == result["candidates"]
