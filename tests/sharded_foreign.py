"""A foreign student's step on 8 devices against one; run by test_foreign."""

import jax
from conftest import EOS, PAD, make_model, make_trajectories
from foreign_model import make_foreign
from sharded_step import TOPD, assert_same, one_device, place, run

from topd_jax.parallel import sharding
from topd_jax.sampling import rollout
from topd_jax.types import Prompts

AXES = {"words/embedding": ("vocab", "embed")}


def step_and_rollout(mesh, axes):
    student, rows = make_foreign(logical_axes=axes), make_trajectories()
    out = run(mesh, TOPD["teacher"], (student, make_model(1)), rows)
    with jax.set_mesh(mesh):
        student = place(student, mesh)
        words = student.params["params"]["words"]["embedding"]
        assert words.sharding.is_fully_replicated == (not axes), words.sharding
        prompts = Prompts(rows.prompt, rows.prompt_mask)
        prompts = jax.device_put(
            prompts, sharding.batch_shardings(prompts, mesh)
        )
        written = rollout(
            student, prompts, jax.random.key(1), max_new_tokens=6,
            eos_ids=(EOS,), pad_id=PAD,
        )  # fmt: skip
    return out, jax.device_get(written)


if __name__ == "__main__":
    assert jax.device_count() == 8
    expected = step_and_rollout(one_device(), None)
    for shape, axes in (((8, 1, 1), None), ((2, 2, 2), AXES)):
        found = step_and_rollout(sharding.make_mesh(*shape), axes)
        assert_same(expected, found)
        print(f"same on {shape}", flush=True)
