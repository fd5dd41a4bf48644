"""Compile one program; say what was read, what was written, and its result."""

import json
import pathlib

import jax
import jax.numpy as jnp

from topd_jax.parallel import compilation

compilation._WORTH_KEEPING = 0.0
folder = compilation.keep_compiled()
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
result = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.arange(12.0).reshape(3, 4))
read = [e for e in events if e.endswith("/compilation_cache/cache_hits")]
print(
    json.dumps(
        {
            "read": len(read),
            "written": len(list(pathlib.Path(folder).glob("*-cache"))),
            "result": result.tolist(),
        }
    )
)
