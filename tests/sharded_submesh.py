"""A teacher on devices of its own; run by test_apart, on 8 of the CPU's."""

import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small_run import small_config

from topd_jax import apart
from topd_jax import train as training
from topd_jax.checkpoint import Checkpoints
from topd_jax.logs import read_jsonl
from topd_jax.pair import load_pair
from topd_jax.phases import make_optimizer
from topd_jax.settings import settings_from
from topd_jax.types import Annotations, Trajectories

# As many devices for the student with the teacher as without, so that its
# own part differs by nothing at all: 8 are 4 x 2.
ONE = {}
TWO = dict(devices=4, fsdp=2)
PARTS = dict(devices=4, data=1, tensor=2, fsdp=2, parts=2)
STEPS = 4


def settings_of(cache, teacher_mesh, steps=STEPS, **objective):
    config = small_config()
    config.world.cache = str(cache)
    config.mesh.fsdp = 2
    config.teacher_mesh.update(teacher_mesh)
    config.objective.update(objective)
    config.data.batch_size = 16
    config.rollout.max_new_tokens = 12
    config.train.steps = steps
    config.optimizer.learning_rate = 1e-2
    config.log.statistics_every = 2
    config.log.completions_every = 2
    config.eval.every = 0
    return settings_from(config)


def state_of(settings, workdir):
    pair = load_pair(settings, workdir, apart=True)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    saved = Checkpoints(workdir / "checkpoints", 2)
    state, _ = saved.restore(
        saved.latest(), training.initial_state(pair, optimizer)
    )
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def rows_of(workdir, name):
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("seconds", "rate")) and k != "grades"
        }
        for row in read_jsonl(workdir / f"{name}.jsonl")
    ]


def assert_same(a, b, settings):
    for x, y in zip(
        state_of(settings, a), state_of(settings, b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)
    assert rows_of(a, "completions") == rows_of(b, "completions")
    for name in ("metrics", "evals"):
        one, two = rows_of(a, name), rows_of(b, name)
        assert one and len(one) == len(two)
        for x, y in zip(one, two, strict=True):
            assert x.keys() == y.keys()
            for key, value in x.items():
                if isinstance(value, float):
                    np.testing.assert_allclose(
                        value, y[key], rtol=2e-3, atol=2e-4, err_msg=key
                    )


def runs(folder):
    """One mesh, two, and two with slices: the same run."""
    cache, made = folder / "world", {}
    options = dict(variant="topd+suppress", branch_temperature=1.0)
    for name, mesh in (("one", ONE), ("two", TWO), ("parts", PARTS)):
        settings = settings_of(cache, mesh, **options)
        made[name] = folder / name
        training.train(settings, made[name])
    for name in ("two", "parts"):
        assert_same(made["one"], made[name], settings)
        print("same run:", name)


def resumed(folder):
    """Half a run on one mesh goes on on two, and the other way round."""
    cache = folder / "world"
    whole = folder / "whole"
    training.train(settings_of(cache, PARTS), whole)
    for name, order in (("there", (ONE, PARTS)), ("back", (PARTS, ONE))):
        for mesh, kills in zip(order, (True, False), strict=True):
            settings = settings_of(cache, mesh)
            if kills:
                stop_after(settings, folder / name, 2)
            else:
                training.train(settings, folder / name)
        assert_same(whole, folder / name, settings)
        print("same after a change of meshes:", name)


def stop_after(settings, workdir, step):
    pair = load_pair(settings, workdir, apart=True)
    with jax.set_mesh(pair.mesh):
        run = training.Run(settings, workdir, pair)
        while run.step < step:
            run._one_step()
        run.save()
        run._close()


class Fakes:
    """Phases of which slice 1 cannot be written before slice 0 is read."""

    def __init__(self) -> None:
        self.read, self.order = threading.Event(), []

    def rollout(self, student, teacher, prompts, key, first_row):
        self.order.append(("rollout", int(first_row)))
        rows = prompts.tokens.shape[0]

        def wait(x):
            # A deadlock, were slice 0 only read after all is written.
            if first_row and not self.read.wait(60):
                raise TimeoutError("slice 0 was not read meanwhile")
            return np.asarray(x)

        @jax.jit
        def write(tokens):
            shape = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
            tokens = jax.pure_callback(wait, shape, tokens)
            mask = jnp.ones((rows, 3), bool)
            return Trajectories(
                tokens, jnp.ones_like(tokens, bool), tokens[:, :3], mask,
                jnp.zeros((rows, 3)), jnp.zeros(rows, bool),
            )  # fmt: skip

        out = write(prompts.tokens)
        spread = apart.sharding.batch_shardings(out, self.mesh)
        return jax.jit(lambda x: x, out_shardings=spread)(out)

    def annotate(self, student, teacher, rows, key, first_row):
        self.order.append(("annotate", int(first_row)))

        def note(x):
            self.read.set()
            return np.asarray(x, np.float32)

        @jax.jit
        def annotate(tokens):
            shape = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
            loss = jax.pure_callback(note, shape, tokens)
            return Annotations(loss[..., None], loss)

        out = annotate(rows.tokens)
        spread = apart.sharding.batch_shardings(out, self.theirs)
        return jax.jit(lambda x: x, out_shardings=spread)(out)


def overlap(folder):
    settings = settings_of(folder / "world", PARTS, variant="opd")
    pair = load_pair(settings, folder, apart=True)
    fakes = Fakes()
    fakes.mesh, fakes.theirs = pair.mesh, pair.teacher_mesh
    reading = apart.Apart(settings, pair, fakes)
    batch = next(pair.stream(settings))
    keys = jax.random.split(jax.random.key(0))
    with jax.set_mesh(pair.mesh):
        written, notes = reading(
            pair.student, batch.prompts, keys, lambda name, value: value
        )
        np.testing.assert_array_equal(written.tokens, notes.teacher_token_loss)
        np.testing.assert_array_equal(written.prompt, batch.prompts.tokens)
    assert fakes.order == [
        ("rollout", 0), ("rollout", 8), ("annotate", 0), ("annotate", 8),
    ]  # fmt: skip
    assert written.tokens.sharding.mesh == pair.mesh
    assert not {*pair.mesh.devices.flat} & {*pair.teacher_mesh.devices.flat}
    print("written and read at once")


def main() -> None:
    folder = Path(sys.argv[1])
    dict(runs=runs, resumed=resumed, overlap=overlap)[sys.argv[2]](folder)


if __name__ == "__main__":
    main()
