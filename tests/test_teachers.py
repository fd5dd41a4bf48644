"""A run of several teachers: each reads its own rows, and logs apart."""

import dataclasses
import json

import jax
import pytest
from small_run import changed, run_in, settings_with

from topd_jax.data.toy_world import problems
from topd_jax.models import DecoderConfig, init_decoder, save_model
from topd_jax.training import loop
from topd_jax.training.config import settings_from
from topd_jax.training.identity import record, require_same_models
from topd_jax.training.logging import read_jsonl
from topd_jax.training.setup import load_setup


@pytest.fixture(scope="module")
def settings(world_cache, tmp_path_factory):
    """The world's teacher reads sums; a random, narrower one the rest."""
    folder = tmp_path_factory.mktemp("teachers")
    config = DecoderConfig(
        vocab_size=64, layers=1, width=16, heads=2, kv_heads=1, head_dim=8,
        mlp_width=32,
    )  # fmt: skip
    model = init_decoder(config, jax.random.key(5))
    save_model(model, folder / "narrow", model_type="llama")
    rows = [
        {
            "question": problem,
            "answer": str(problems.answer(problem)),
            "teacher": "rest" if i % 4 == 0 else "world",
        }
        for i, problem in enumerate(problems.problems("train", 40, 0))
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = settings_with(
        world_cache, data__held_out=8, train__steps=3, log__tensorboard=True,
        objective="topd(candidates=1, window=4, guidance_weight=0.3)",
    ).to_dict()  # fmt: skip
    config["teachers"] = {
        "world": config["teacher"],
        "rest": config["teacher"] | {"source": str(folder / "narrow")},
    }
    config["data"] |= {
        "source": "jsonl", "path": str(path), "teacher_field": "teacher"
    }  # fmt: skip
    return settings_from(config)


@pytest.fixture(scope="module")
def finished(settings, setup, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    run_in(settings, workdir, setup).train()
    return workdir


def test_a_run_logs_every_teacher_apart(finished):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3]
    timed = rows[2]
    for name in (
        "divergence", "teacher_token_loss", "distance", "num_tokens",
        "length_mean", "reverse_kl", "teacher_entropy", "top_k_mass",
    ):  # fmt: skip
        assert timed[f"{name}/rest"] != timed[f"{name}/world"], name
        assert timed[name] is not None
    tokens = [timed[f"num_tokens{n}"] for n in ("", "/rest", "/world")]
    assert tokens[0] == tokens[1] + tokens[2]
    for row in read_jsonl(finished / "evals.jsonl"):
        assert (row["problems/rest"], row["problems/world"]) == (2, 6)
        assert row["problems"] == 8
        assert row["exact_match/rest"] is not None
        assert row["reverse_kl/rest"] != row["reverse_kl/world"]
    completions = read_jsonl(finished / "completions.jsonl")
    assert {r["teacher"] for r in completions} == {"rest", "world"}
    assert list((finished / "tensorboard").iterdir())


def test_every_prompt_is_compared_with_its_own_teacher(settings, setup):
    rest, _ = setup.teachers
    assert [(t.name, t.prompts) for t in setup.teachers] == [
        ("rest", 2), ("world", 6)
    ]  # fmt: skip
    evaluator = setup.evaluator(settings)
    with jax.set_mesh(setup.mesh):
        row, _ = evaluator.evaluate(rest.model, 0)
    assert abs(row["reverse_kl/rest"]) < 1e-5
    assert row["reverse_kl/world"] > 1e-3
    fingerprints = setup.teacher_fingerprints
    other = fingerprints | {"rest": "f" * 64}
    saved = record(settings, "opd", other, {}, None)
    with pytest.raises(ValueError, match=r"another teacher 'rest' \(fing.*fff"):
        require_same_models(saved, fingerprints, "", "here")


def test_offline_each_teacher_writes_its_own(settings, tmp_path):
    settings = changed(settings, "train", steps=1, stage="offline")
    settings = changed(settings, "log", statistics_every=1, top_k=4)
    settings = changed(settings, "offline", temperature=1.0, top_p=1.0)
    loop.train(changed(settings, "eval", every=0), tmp_path)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["cross_entropy"] > 0
    # Own samples are on average as unlikely as the entropy says.
    assert row["teacher_token_loss"] == pytest.approx(
        row["teacher_entropy"], rel=0.2
    )


def test_what_does_not_fit_is_refused_before_models_are_made(
    settings, tmp_path
):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "teacher": "wrold"}\n')
    with pytest.raises(ValueError, match="line 1.* the nearest is 'world'"):
        load_setup(changed(settings, "data", path=str(path)), tmp_path)
    assert not (tmp_path / "world").exists()  # nothing was trained
    bare = dict.fromkeys(settings.teachers, settings.teachers["rest"])
    lonely = dataclasses.replace(settings, teachers=bare, student=bare["rest"])
    with pytest.raises(
        ValueError, match="student.source or teachers.rest.source or teachers.w"
    ):
        load_setup(lonely, tmp_path)
