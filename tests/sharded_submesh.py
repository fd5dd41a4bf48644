"""A teacher on devices of its own; run by test_apart, on 8 of the CPU's."""

import dataclasses
import os
import sys
from pathlib import Path

from children import simulated

if sys.argv[2] == "overlap":
    # One device each: what spans several, a CPU runs one after the other.
    os.environ["XLA_FLAGS"] = simulated(2)

import jax
import jax.numpy as jnp
import numpy as np
from small_run import small_config

from topd_jax.evaluation import evaluator
from topd_jax.models import init_decoder
from topd_jax.models.lora import split
from topd_jax.parallel import apart, sharding
from topd_jax.training import loop as training
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.config import settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.phases import make_optimizer, make_phases
from topd_jax.training.setup import load_pair
from topd_jax.training.teachers import Teachers
from topd_jax.types import Annotations, Trajectories

# The student on 8 devices, and on 4 of them.
ONE = {}
TWO = dict(devices=4, fsdp=2)
PARTS = dict(devices=4, data=1, tensor=2, fsdp=2, parts=2)


def settings_of(cache, teacher_mesh, fsdp=2, **objective):
    config = small_config()
    config.world.cache = str(cache)
    config.mesh.fsdp = fsdp
    config.teacher_mesh.update(teacher_mesh)
    config.objective.update(objective)
    config.data.batch_size = 16
    config.rollout.max_new_tokens = 12
    config.train.steps = 4
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
    for x, y in zip(state_of(settings, a), state_of(settings, b), strict=True):
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
    options = dict(variant="topd+suppress", branch_temperature=1.0)
    for name, mesh in (("one", ONE), ("two", TWO), ("parts", PARTS)):
        settings = settings_of(folder / "world", mesh, **options)
        # The preflight brings both models together, and changes nothing.
        looks = dataclasses.replace(settings.train, preflight=name == "parts")
        settings = dataclasses.replace(settings, train=looks)
        training.train(settings, folder / name)
        if name != "one":
            assert_same(folder / "one", folder / name, settings)
            print("same run:", name)


def models(folder):
    """What both models say of a token, and what each teacher reads."""
    cases = {
        "score": (dict(variant="topd", score="reverse_kl"), PARTS),
        "teachers": (dict(variant="tip"), TWO),
    }
    for name, (options, mesh) in cases.items():
        found = []
        for axes in (ONE, mesh):
            settings = settings_of(folder / "world", axes, **options)
            pair = load_pair(settings, folder, apart=True)
            batch = next(pair.stream(settings))
            if name == "teachers":
                pair = with_a_second_teacher(pair)
            found.append(one_step(settings, pair, batch.prompts))
        a, b = map(jax.tree.leaves, found)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-4)
        print("same step:", name)


def with_a_second_teacher(pair):
    mesh = pair.teacher_mesh or pair.mesh
    narrow = dataclasses.replace(pair.teacher.config, width=16, mlp_width=32)
    other = init_decoder(narrow, jax.random.key(5))
    where = sharding.tree_shardings(other, mesh, other.logical_axes)
    several = {"a": pair.teacher, "b": jax.device_put(other, where)}
    return dataclasses.replace(pair, teacher=Teachers(several, (8, 8)))


def one_step(settings, pair, prompts):
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    phases = make_phases(settings, optimizer, eos_ids=(2,), pad_id=0)
    reading = apart.make_reading(settings, pair, phases)
    keys = jax.random.split(jax.random.key(0))
    with jax.set_mesh(pair.mesh):
        written, notes = reading(
            pair.student, prompts, keys, lambda name, value: value
        )
        statistics = reading.statistics(pair.student, written)
        if isinstance(pair.teacher, Teachers):  # an evaluation asks each
            rows = pair.teacher.split(written)["b"]
            told = evaluator.Evaluator(settings, pair)._statistics(
                pair.student, pair.teacher.models["b"], rows
            )
            for name, value in told.items():
                np.testing.assert_allclose(
                    value, statistics[f"{name}/b"], rtol=1e-3
                )
        frozen = split(pair.student)[1]
        state, metrics = phases.update(
            training.initial_state(pair, optimizer), reading.head, written,
            notes, frozen,
        )  # fmt: skip
    return jax.tree.map(
        np.asarray, (written.tokens, statistics, state.student, metrics)
    )


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
        run.evaluate()
        while run.step < step:
            run._one_step()
        run.save()
        run._close()


class Fakes:
    """Phases that keep what they give; the last slice takes long to write."""

    def __init__(self) -> None:
        self.order, self.long = [], 1
        self.written, self.read = [], []

    def rollout(self, student, teacher, prompts, key, first_row):
        self.order.append(("rollout", first_row))
        count = self.long if first_row else 1
        work = np.ones((128, 128), np.float32)
        self.written.append(self._write(prompts.tokens, work, count))
        return self.written[-1]

    def annotate(self, student, teacher, rows, key, first_row, states):
        self.order.append(("annotate", first_row))
        self.read.append(self._note(rows.tokens))
        return self.read[-1]

    @staticmethod
    @jax.jit
    def _write(tokens, work, count):
        # Products, for what is little a CPU does where it is dispatched.
        x = jax.lax.fori_loop(0, count, lambda i, x: x @ x * 0.01, work)
        new = tokens[:, -3:]
        return Trajectories(
            tokens, tokens > 0, new, jnp.ones_like(new, bool),
            jnp.full(new.shape, x[0, 0]), jnp.zeros(new.shape[0], bool),
        )  # fmt: skip

    @staticmethod
    @jax.jit
    def _note(tokens):
        loss = tokens.astype(jnp.float32)
        return Annotations(loss[..., None], loss)


def overlap(folder):
    """Slice 0 has been read while slice 1 is still being written."""
    alone = dict(devices=1, parts=2)
    settings = settings_of(folder / "world", alone, fsdp=1, variant="opd")
    pair = load_pair(settings, folder, apart=True)
    fakes = Fakes()
    reading = apart.Apart(settings, pair, fakes)
    batch = next(pair.stream(settings))
    keys = jax.random.split(jax.random.key(0))
    with jax.set_mesh(pair.mesh):
        for fakes.long in (1, 40_000):  # compiled first
            for kept in (fakes.order, fakes.written, fakes.read):
                kept.clear()
            written, notes = reading(
                pair.student, batch.prompts, keys, lambda name, value: value
            )
            jax.block_until_ready(fakes.read[0])
            while_written = not fakes.written[1].tokens.is_ready()
            jax.block_until_ready(notes)
    assert while_written
    assert fakes.order == [
        ("rollout", 0), ("rollout", 8), ("annotate", 0), ("annotate", 8),
    ]  # fmt: skip
    np.testing.assert_array_equal(written.prompt, batch.prompts.tokens)
    np.testing.assert_array_equal(written.tokens, notes.teacher_token_loss)
    assert written.tokens.sharding.mesh == pair.mesh
    assert not {*pair.mesh.devices.flat} & {*pair.teacher_mesh.devices.flat}
    # Where programs send what moves, these have their place before a slice.
    fakes.order.clear()
    reading._sends = True
    with jax.set_mesh(pair.mesh):
        again, _ = reading(
            pair.student, batch.prompts, keys, lambda name, value: value
        )
    assert fakes.order == [
        ("rollout", 0), ("annotate", 0), ("rollout", 8), ("annotate", 8),
    ]  # fmt: skip
    np.testing.assert_array_equal(again.tokens, written.tokens)
    print("read while the next is written")


def main() -> None:
    folder = Path(sys.argv[1])
    {f.__name__: f for f in (runs, models, resumed, overlap)}[sys.argv[2]](
        folder
    )


if __name__ == "__main__":
    main()
