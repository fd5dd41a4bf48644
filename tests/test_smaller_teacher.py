"""A training step with a teacher in fewer bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import settings_with

from topd_jax.models import fingerprint
from topd_jax.models.quantization import is_quantized
from topd_jax.objectives.loading import make_objective
from topd_jax.parallel.sharding import spread_rows
from topd_jax.training.compiled import compile_step, make_optimizer
from topd_jax.training.loop import initial_state
from topd_jax.training.setup import load_setup

HALF = {"teacher__dtype": "bfloat16", "teacher__param_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "changes",
    [
        HALF | {"teacher__quantize": "int8"},
        {"teacher__quantize": "int4", "train__stage": "offline"},
    ],
    ids=["int8 in bf16", "int4, writing"],
)
def test_an_fp32_student_learns_from_it(world_cache, tmp_path, changes):
    settings = settings_with(world_cache, **changes)
    setup = load_setup(settings, tmp_path)
    teacher = setup.teachers[0].model
    assert is_quantized(teacher.arrays["q"])
    assert teacher.arrays["embedding"].dtype == settings.teacher.param_dtype
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    step = compile_step(
        settings, make_objective(settings.objective), optimizer,
        eos_ids=setup.tokenizer.eos_ids, pad_id=setup.tokenizer.pad_id,
    )  # fmt: skip
    state = initial_state(setup.student, optimizer, setup.mesh)
    before = np.asarray(state.student.arrays["q"])
    prompts = spread_rows(next(setup.stream(settings)).prompts, setup.mesh)
    inputs, key = setup.teachers, jax.random.key(0)
    with jax.set_mesh(setup.mesh):
        written = step.rollout(state.student, inputs, prompts, key)
        scored = step.score(state.student, inputs, written, key)
        seen = step.statistics(state.student, inputs, written)
        for _ in range(2):  # the first is all warm-up
            state, metrics = step.train_step(state, written, scored, None)
    if not settings.is_offline:
        assert scored[0].teacher_hidden.dtype == settings.teacher.dtype
        assert scored[0].teacher_token_loss.dtype == jnp.float32
    for name, (total, count) in {**seen, **metrics}.items():
        assert total.dtype == jnp.float32, name
        assert np.isfinite(total), name
        assert count >= 0
    for name, x in state.student.arrays.items():
        assert x.dtype == jnp.float32, name
        assert np.isfinite(x).all(), name
    assert np.abs(state.student.arrays["q"] - before).max() > 0
    assert setup.teacher_fingerprints == {"": fingerprint(teacher)}
