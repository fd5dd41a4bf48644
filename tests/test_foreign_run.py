"""Foreign models in a run, on eight devices, and what of them is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import on_eight_devices
from foreign_model import apply, init_params, make_foreign, words

from topd_jax.models import from_function


@pytest.mark.slow
def test_a_whole_run_with_a_foreign_student(tmp_path, world_cache):
    from small_run import small_config

    from topd_jax.training.config import settings_from
    from topd_jax.training.loop import Run
    from topd_jax.training.other_models import with_models
    from topd_jax.training.setup import load_pair
    from topd_jax.training.teachers import Teachers

    config = small_config()
    config.world.cache = str(world_cache)
    config.train.steps = 3
    settings = settings_from(config)
    pair = load_pair(settings, tmp_path)
    with pytest.raises(ValueError, match="vocab_size=40 is smaller"):
        with_models(pair, student=make_foreign())
    several = Teachers({"one": pair.teacher, "two": pair.teacher}, (4, 4))
    with pytest.raises(ValueError, match="takes the place of 2 teachers"):
        with_models(
            dataclasses.replace(pair, teacher=several), teacher=pair.teacher
        )
    size = pair.tokenizer.vocab_size
    params = {"rows": jax.random.normal(jax.random.key(0), (size, 8))}

    def bag(params, tokens, positions, mask, cache):
        x = params["rows"][tokens] / (1.0 + positions[..., None])
        return jnp.tanh(mask.astype(x.dtype) @ x), None

    model = from_function(bag, params, head=lambda p: p["rows"])
    pair = with_models(pair, student=model)
    with jax.set_mesh(pair.mesh):
        run = Run(settings, tmp_path / "run", pair)
    final = run.train()
    assert final["step"] == 3 and np.isfinite(final["reverse_kl"])
    assert (run.state.student.params["rows"] != params["rows"]).any()
    with jax.set_mesh(pair.mesh):
        again = Run(settings, tmp_path / "run", pair)
    assert again.step == 3
    np.testing.assert_array_equal(
        again.state.student.params["rows"], run.state.student.params["rows"]
    )


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one():
    said = on_eight_devices("sharded_foreign.py")
    assert said.count("same on") == 2


def refuse(match, function=apply, params=None, **options):
    params = init_params(0) if params is None else params
    with pytest.raises(ValueError, match=match):
        from_function(function, params, **({"head": words} | options))


def test_what_does_not_fit_is_refused():
    refuse(r"head\(params\) has shape \(12,\)", head=lambda p: words(p)[0])
    refuse(
        r"embedding\(params\) has shape \(480,\)",
        embedding=lambda p: words(p).reshape(-1),
    )
    refuse(r"must return \[1, 2, 40\]", head=lambda p: words(p).T)
    refuse("must return .hidden, cache.", lambda p, *_: words(p))
    ids = functools.partial(jnp.zeros, dtype=jnp.int32)
    refuse(
        "must return what it was given",
        lambda p, a, b, mask, cache: apply(p, a, b, mask[..., :2], None),
        init_cache=lambda batch, columns: ids((batch, columns)),
    )
