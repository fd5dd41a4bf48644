"""The attention kernels interpreted on a CPU, where a TPU would take them."""

import contextlib
import functools
from unittest import mock

import jax

from topd_jax.models.attention import flash


@contextlib.contextmanager
def interpreted_kernels():
    """Yields a list that grows a call by (kernel, shapes of its arrays, its
    options)."""
    calls, by_platform = [], jax.lax.platform_dependent
    options = functools.partial(flash.Options, interpret=True)

    def on_tpu(*arrays, tpu, default):
        function = getattr(tpu, "func", tpu)
        if ".attention." not in function.__module__:  # of the experts
            return by_platform(*arrays, tpu=tpu, default=default)
        shapes = [x.shape for x in arrays if isinstance(x, jax.Array)]
        calls.append((function.__name__, shapes, tpu.keywords))
        return tpu(*arrays)

    with (
        mock.patch.object(jax.lax, "platform_dependent", on_tpu),
        mock.patch.object(flash, "Options", options),
    ):
        jax.clear_caches()
        yield calls
    jax.clear_caches()
