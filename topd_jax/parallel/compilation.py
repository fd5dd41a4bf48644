"""Keep compiled programs between runs, on this machine; compiler options.

JAX can read a program that an earlier process compiled. It tells programs
apart by what they compute, by flags and versions, not by the processor that
they were compiled for: a home directory that machines share would hand one
machine's program to another. Here each kind of machine has a directory of its
own. A file that was cut short does not decompress, and its program is compiled
again.
"""

import functools
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from topd_jax.parallel import buckets

# Programs that compile faster are not worth a file, seconds.
_WORTH_KEEPING = 0.2
# Functions whose programs stay in memory: those of a sweep of 15 variants.
_HELD = 64


def keep_compiled(choice: str = "auto") -> pathlib.Path | None:
    """Let JAX keep compiled programs, before it compiles the first.

    Nothing is kept where the processor plays several devices: such a program,
    once it is read from a file, may wait for itself forever (seen in jaxlib
    0.10.2). ``JAX_COMPILATION_CACHE_DIR``, where it is set, stays in force.

    Args:
      choice: "auto" takes the user's cache directory (``XDG_CACHE_HOME``, else
        ``~/.cache``); "off" or "" keeps nothing; else a directory.

    Returns:
      The directory; None where nothing is kept.
    """
    simulated = "xla_force_host_platform_device_count"
    several = simulated in os.environ.get("XLA_FLAGS", "")
    several |= (jax.config.jax_num_cpu_devices or 1) > 1
    if choice in ("", "off") or several:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(given)
    home = pathlib.Path(
        os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    )
    folder = home / "topd_jax" if choice == "auto" else buckets.as_path(choice)
    folder = folder / machine_key()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING
    )
    return folder


def decoding_options(mesh: Mesh | None, sharding: str) -> dict[str, bool]:
    """Return the compiler's options for a program that writes tokens.

    Where one turn of a loop gathers the parameters of several layers for a
    single token (recurrent layers beside attention, or ``unroll``), libtpu
    0.0.52 may fail once it fuses the gathers with other work: "INTERNAL:
    async-collective-start overlaps with another chunk". A token computes too
    little to hide a gather behind, so they are not fused.

    Args:
      mesh: of the devices that the program is compiled for; None is one.
      sharding: ``rollout.sharding``; only "train" gathers at every token.

    Returns:
      ``compiler_options`` of :func:`jax.jit`.
    """
    on_tpu = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    if sharding != "train" or not on_tpu:
        return {}
    return {"xla_tpu_enable_async_collective_fusion": False}


def jitted(
    function: functools.partial,
    *,
    shared: bool,
    out_shardings: Any = None,
    donate_argnums: int | tuple[int, ...] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """Jit a function with keywords bound, once for equal keywords.

    So a second run in a process, of another seed or from a checkpoint, finds
    the programs of the first.

    Args:
      function: with keywords, no positional arguments.
      shared: whether a later call may return it too; then its keywords have
        hashes. Not where it runs code of the user's, which may read what has
        changed since it was traced.
      out_shardings: as those of :func:`jax.jit`.
      donate_argnums: the same.
      compiler_options: the same.

    Returns:
      What :func:`jax.jit` returns.
    """
    leaves, tree = jax.tree.flatten(out_shardings, lambda x: x is None)
    make = _jitted if shared else _jitted.__wrapped__
    return make(
        function.func, tuple(function.keywords.items()), tuple(leaves), tree,
        donate_argnums, tuple((compiler_options or {}).items()),
    )  # fmt: skip


@functools.lru_cache(_HELD)
def _jitted(
    function: Callable[..., Any],
    keywords: tuple[tuple[str, Any], ...],
    leaves: tuple[Any, ...],
    tree: Any,
    donate_argnums: int | tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
) -> Any:
    return jax.jit(
        functools.partial(function, **dict(keywords)),
        out_shardings=jax.tree.unflatten(tree, leaves),
        donate_argnums=donate_argnums,
        compiler_options=dict(options),
    )


def machine_key() -> str:
    """Return 16 hex digits of the processor: its kind and what it can do.

    JAX itself tells versions, platforms and flags of XLA apart.
    """
    about = pathlib.Path("/proc/cpuinfo")  # of Linux
    lines = about.read_text().splitlines() if about.exists() else []
    kinds = ("model name", "flags", "Features", "CPU part")
    found = sorted({line for line in lines if line.startswith(kinds)})
    text = "\n".join([platform.machine(), platform.processor(), *found])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
