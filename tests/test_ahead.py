"""Programs compile ahead of their calls; on eight devices in a child."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest
from children import on_eight_devices
from compiled_once import compilations

from topd_jax.training.ahead import compile_ahead


def test_a_call_takes_the_program_that_was_compiled_ahead():
    @jax.jit
    def double(x):
        return 2 * x

    @jax.jit
    def add(x):
        return x + 1

    x = jnp.ones(3)
    with compilations() as names:
        first = double.trace(x)
        said = compile_ahead(
            [("one", [first]), ("two", [add.trace(first.out_info)] * 2)]
        )
        assert sorted(names) == ["add", "double"]
        assert add(double(x)).tolist() == [3.0] * 3
    assert len(names) == 2
    assert said.startswith("compiled ") and "two 0." in said


class Slow:
    """A program that compiles for a while."""

    def __init__(self):
        self.started, self.compiled = threading.Event(), False

    def lower(self):
        return self

    def compile(self):
        self.started.set()
        time.sleep(0.2)
        self.compiled = True


def test_no_thread_outlives_an_interrupt():
    slow = Slow()

    def programs():
        yield "slow", [slow]
        slow.started.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ahead(programs())
    assert slow.compiled


@pytest.mark.slow
def test_on_eight_devices_each_program_compiles_once(tmp_path):
    assert "each program once" in on_eight_devices("compiled_once.py", tmp_path)
