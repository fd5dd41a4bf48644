"""The command of ``tests/benchmarks`` works; no time is asserted."""

import json
import runpy
import sys
from pathlib import Path

import bounds
import ours
import pytest
import rounds
import slots
import works

ROOT = Path(__file__).parents[2]
SMALL = dict(
    layers=1, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=32,
    vocab_size=32,
)  # fmt: skip


@pytest.mark.slow
def test_sides_take_turns():
    """One cannot run, and one ends."""
    work = works.decode("tunix", 2, dict(student=SMALL, prompt=4, new=3))
    broken = works.Side("ours.py", "decode", {"student": SMALL, "rows": "x"})
    work = {**work, "broken": broken}
    row = rounds.measure(work, 2, {"tunix": RuntimeError("no network")})
    assert row["skipped"] == {"tunix": "no network"}
    assert "TypeError" in row["failed"]["broken"]
    assert row["ours"]["seconds"] > 0
    shares = row["ratios"]
    assert 0 < shares["bound/ours"]["seconds"] < shares["least/ours"]["seconds"]


def test_slots_take_fewer_steps_than_fixed_batches(monkeypatch, capsys):
    monkeypatch.setattr(slots, "STUDENT", SMALL)
    plain = slots.rollouts.write_in_slots
    monkeypatch.setattr(slots.rollouts, "write_in_slots", plain)
    slots.main(["--slots=2", "--limit=20", "--prompt=4", "--rounds=1"])
    row = json.loads(capsys.readouterr().out)
    steps = row["steps"]
    assert steps["bound"] <= steps["slots"] < steps["fixed"]
    assert row["slots/bound"]["steps"] == pytest.approx(
        steps["bound"] / steps["slots"], abs=1e-3
    )


def test_ratios_are_of_each_round():
    told = {
        "opd": [{"seconds": 4.0}, {"seconds": 2.0}, {"seconds": 8.0}],
        "branches": [{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 1.0}],
        "ours": [{"seconds": 1.0}, {"seconds": 4.0}, {"seconds": 2.0}],
        "peer": [{"seconds": 2.0}, {"seconds": 4.0}, {"seconds": 8.0}],
        "bound": [{"seconds": 0.5}, {"seconds": 1.0}, {"seconds": 1.0}],
        "rest": [{"seconds": 0.25}, {"seconds": 2.0}, {"seconds": 0.1}],
    }
    assert rounds.ratios(told) == {
        "ours/opd": {"seconds": 0.25},
        "ours/peer": {"seconds": 0.5},
        "bound/ours": {"seconds": 0.5},
        "least/ours": {"seconds": 0.75},
        "least/opd": {"seconds": 1.25},
    }


def test_a_step_and_its_branches_run():
    spec = dict(student=SMALL, teacher=SMALL, rows=2, prompt=4, new=6)
    work = works.against_opd(spec, "candidates=3", "window=2")
    told = work["branches"].spec
    assert (told["branches"], told["window"], told["trained"]) == (1, 2, True)
    for name in ("ours", "opd"):
        assert ours.step(**work[name].spec)()["train_step"] > 0
    assert bounds.branches(**told)()["train_step"] > 0


def test_command(monkeypatch, capsys):
    file = str(ROOT / "tests/benchmarks/__main__.py")
    for words, said in ((["--list"], "0"), (["dekode"], "begins no work")):
        monkeypatch.setattr(sys, "argv", [file, *words])
        with pytest.raises(SystemExit, match=said):
            runpy.run_path(file, run_name="__main__")
    assert "decode-8x64-tunix" in capsys.readouterr().out
