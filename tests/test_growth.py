"""Growth: formulas by hand, exponents, the record; a step counted for real."""

import dataclasses
import json
import math

import jax
import pytest

from topd_jax.configs import growth as base
from topd_jax.planning import growth
from topd_jax.planning.growth_formulas import formulas
from topd_jax.planning.growth_table import Rate, draw, rates, table
from topd_jax.training.config import settings_from

SETTINGS = settings_from(base.get_config())


def small():
    config = base.get_config()
    config.rollout.max_new_tokens = 16
    config.data.max_prompt_length = 8
    config.world.vocab_size = 640
    for model in ("student", "teacher"):
        config.world[f"{model}_width"] = 32
    return settings_from(config)


def test_the_formula_of_decoding_by_hand():
    work = formulas(SETTINGS)["decode"]
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    flops = 2 * (2 * layer + 2048 * 64) + 2 * 4 * 64 * (16 + 64 / 2)
    assert work.flops == 4 * 64 * flops
    # 4 rows, 64 tokens; each reads every parameter once for all rows.
    assert work.bytes > 64 * 4 * (2 * layer + 2048 * 64)


@pytest.mark.parametrize(
    ("varied", "phase", "quantity", "power"),
    [
        ("T", "decode", "flops", 1), ("B", "update", "flops", 1),
        ("M", "branches", "flops", 1), ("N", "scoring", "flops", 1),
        ("T", "update", "sent", 0), ("n", "update", "flops", -1),
    ],
)  # fmt: skip
def test_a_formula_grows_as_its_leading_term(varied, phase, quantity, power):
    start = dataclasses.replace(
        SETTINGS, mesh=dataclasses.replace(SETTINGS.mesh, fsdp=4)
    )
    values = []
    for factor in (2**9, 2**10):
        one = growth.grown(start, varied, factor)
        work = formulas(one, one.mesh.fsdp)[phase]
        values.append(getattr(work, quantity))
    # A token's attention grows with T, and that of a branch with its prefix.
    slack = 1.0 if varied == "T" and quantity == "flops" else 0.05
    found = math.log2(values[1] / values[0])
    assert power - 0.05 <= found <= power + slack


def test_what_is_varied_grows_alone():
    for varied in growth.VARIED:
        changed = growth.grown(SETTINGS, varied, 4)
        old, new = growth.sizes_of(SETTINGS), growth.sizes_of(changed)
        assert new.pop(varied) == 4 * old.pop(varied)
        if varied == "n":  # rows that the most devices can share
            assert new.pop("B") == 16 * old.pop("B")
        assert new == old


def test_the_smaller_side_of_a_topology_is_doubled_first():
    assert growth.larger("v5e:2x2", 1) == "v5e:2x2"
    assert growth.larger("v5e:2x2", 2) == "v5e:2x4"
    assert growth.larger("v5e:2x2", 8) == "v5e:4x8"
    assert growth.larger("v5p:2x2x1", 4) == "v5p:2x2x4"


def row(varied, size, factor, decode):
    work = dict(flops=1e9 * factor, bytes=1e8 * factor, temporaries=0.0, sent=0)
    return {
        "target": "cpu:1", "varied": varied, "size": size,
        "phases": {"decode": work | {"bytes": decode}},
        "formula": {"decode": work}, "seconds": {"decode": 0.1 * factor},
    }  # fmt: skip


def test_half_a_power_above_the_formula_is_a_surprise(tmp_path):
    rows = [row("T", 64 * f, f, 1e8 * f**2) for f in (1, 2, 4)]
    found = {r.quantity: r for r in rates(rows, growth.CORE)}
    assert found["bytes"].exponents == (2.0, 2.0)
    assert found["bytes"].formula == (1.0, 1.0)
    assert found["bytes"].surprising and found["bytes"].excess == 1.0
    assert not found["flops"].surprising
    assert not found["seconds"].surprising
    assert not found["sent"].surprising  # nothing is sent, nothing is told
    text = table(list(found.values()))
    assert "**2.00** (1.00)" in text
    assert "surprise: bytes of decode in T: 2.00 (1.00), 2.00 (1.00)" in text
    draw(rows, growth.CORE, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_what_is_too_small_to_tell_is_no_surprise():
    rate = Rate("T", "decode", "sent", (1, 2), (0.0, 9.0), (math.nan,), (1.0,))
    assert not rate.surprising and "nothing grows" in table([rate])


def test_a_record_is_resumed_and_another_base_refused(tmp_path, monkeypatch):
    asked = []

    def measure(settings, devices, chip, *, run):
        asked.append(growth.sizes_of(settings))
        work = formulas(settings, settings.mesh.fsdp)
        phases = {n: dataclasses.asdict(w) for n, w in work.items()}
        if len(asked) == 5 and not tmp_path.joinpath("stopped").exists():
            tmp_path.joinpath("stopped").touch()
            raise KeyboardInterrupt
        return {"phases": phases, "formula": phases, "seconds": {}}

    monkeypatch.setattr(growth, "measure", measure)
    monkeypatch.setattr(growth, "_devices", lambda t, base: (range, base))
    with pytest.raises(KeyboardInterrupt):
        growth.growth(SETTINGS, tmp_path, None)
    text = growth.growth(SETTINGS, tmp_path, None)
    assert "nothing grows" in text and (tmp_path / "growth-cpu-1.png").exists()
    # One base, four doublings of six sizes, five numbers of devices, of
    # which one is a doubling of B; one point was asked for twice.
    assert len(asked) == 1 + 4 * 6 + 5 - 1 + 1
    lines = (tmp_path / "growth.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 7 * 5
    assert json.loads(lines[0])["target"] == "cpu:1"
    with pytest.raises(ValueError, match="another base"):
        growth.growth(small(), tmp_path, None)


def test_models_of_fixed_shapes_are_refused(tmp_path):
    config = base.get_config()
    config.student.source = "Qwen/Qwen3-4B-Instruct-2507"
    with pytest.raises(ValueError, match="try --config growth"):
        growth.growth(settings_from(config), tmp_path, None)


@pytest.mark.slow
def test_a_step_is_counted_as_its_formula_says_and_runs():
    settings = small()
    device = jax.devices("cpu")[:1]
    made = growth.measure(settings, device, growth.CORE, run=True)
    for phase, counted in made["phases"].items():
        wanted = made["formula"][phase]["flops"]
        slack = 1.6 if phase == "branches" else 1.1  # columns of all branches
        assert wanted / 1.1 < counted["flops"] < slack * wanted, phase
    assert set(made["seconds"]) == {"decode", "scoring", "branches", "update"}
    assert all(made["seconds"][n] > 0 for n in ("decode", "scoring", "update"))
