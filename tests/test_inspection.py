"""The page of a run's trajectories: its data (see test_pages_browser.py)."""

import json
import re

import jax
import numpy as np
import pytest
from html_page import Page
from small_run import small_config

from topd_jax.cli import main
from topd_jax.experiments.observe import looking_ahead, observe
from topd_jax.experiments.token_map import trajectories_of, write_page
from topd_jax.objectives.objective import Objective
from topd_jax.training.config import settings_from
from topd_jax.training.setup import load_pair

ABOUT = {"title": "A <page>", "facts": {"student": "start & more"}}


@pytest.fixture(scope="module")
def seen(world_cache, tmp_path_factory):
    """(settings, pair, batches) of six problems in batches of four."""
    config = small_config()
    config.world.cache = str(world_cache)
    config.eval.batch_size = 4
    config.objective.variant = "opd"  # trains without looking ahead
    settings = settings_from(config)
    pair = load_pair(settings, tmp_path_factory.mktemp("pair"))
    with jax.set_mesh(pair.mesh):
        batches = list(observe(settings, pair, pair.student, 6))
    return settings, pair, batches


@pytest.fixture(scope="module")
def rows(seen):
    _, pair, batches = seen
    return [
        row
        for batch in batches
        for row in trajectories_of(batch, pair, window=4, is_world=True)
    ]


def test_every_objective_can_look_ahead():
    plain = Objective(variant="opd", window=7)
    assert looking_ahead(plain).pieces.looks_ahead
    assert looking_ahead(plain).window == 7
    capped = Objective(variant="opd+suppress")
    assert looking_ahead(capped) == capped


def test_rows_say_what_the_arrays_hold(seen, rows):
    _, pair, batches = seen
    assert [len(b.records) for b in batches] == [4, 2]
    assert [r["problem"] for r in rows] == [
        r["prompt"] for r in pair.test.records[:6]
    ]
    row, notes = rows[4], batches[1].notes[0]  # the second batch's first
    written = batches[1].trajectories
    count = int(written.mask[0].sum())
    assert len(row["tokens"]) == len(row["loss"]) == len(row["truth"]) == count
    ids = written.tokens[0][:count].tolist()
    text = "".join(row["tokens"]).replace("<end>", "")
    assert text == pair.tokenizer.decode(ids)
    assert row["right"] is pair.grade(batches[1].records[:1], [text])[0]
    for slot, found in enumerate(row["candidates"]):
        at = notes.candidates.positions[0, slot]
        assert found["at"] == at
        assert found["distance"] == pytest.approx(
            float(notes.distance[0, slot]), abs=1e-4
        )
        assert found["divergent"] == notes.divergent[0, slot]
        assert found["student"] == row["tokens"][at : at + 4]
        plan = np.array(found["plan"])
        assert plan.shape == (len(found["student"]), len(found["teacher"]))
        np.testing.assert_allclose(plan.sum(1), 1.0, atol=0.01)
    losses = [row["loss"][c["at"]] for c in row["candidates"]]
    assert sorted(losses) == sorted(row["loss"])[-len(losses) :]


def test_the_page_carries_all_and_asks_for_nothing(rows, tmp_path):
    rows = [dict(rows[0], problem="</script><!--<b>&\u2028"), *rows[1:]]
    path = tmp_path / "page.html"
    write_page(rows, ABOUT, path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0]) == {"trajectories": rows}
    assert set(page.addresses) == {"data:,"}
    assert not re.search(r"https?://|@import|url\(|fetch\(", text)
    assert "A &lt;page&gt;" in text and "start &amp; more" in text
    assert "prefers-color-scheme: dark" in text


def test_inspect_from_the_command_line(trained, small_arguments, capsys):
    capsys.readouterr()
    main.run(["inspect", *small_arguments, f"--workdir={trained}",
              "--which=start", "--count=3"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["trajectories"] == 3 and 3 <= found["candidates"] <= 6
    page = Page((trained / "inspect-start.html").read_text())
    assert len(json.loads(page.scripts[0])["trajectories"]) == 3
