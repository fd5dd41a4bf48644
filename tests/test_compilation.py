"""Compiled programs are kept for machines of one kind, and for no other."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import run_script
from jax.experimental.compilation_cache import compilation_cache

from topd_jax.cli import main
from topd_jax.objectives.loading import make_objective
from topd_jax.parallel import compilation


@pytest.fixture(autouse=True)
def restored():
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_programs_go_to_the_users_cache_directory_or_another(home, monkeypatch):
    folder = compilation.keep_compiled()
    assert folder.parent == home / "topd_jax"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    other = home / "other"
    assert compilation.keep_compiled(str(other)).parent == other
    compilation.keep_compiled("gs://bucket/programs")  # JAX can read there
    place = f"gs://bucket/programs/{compilation.machine_key()}"
    assert jax.config.jax_compilation_cache_dir == place
    # That which the user set stays.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "mine"))
    assert compilation.keep_compiled(str(other)) == home / "mine"


def test_off_and_several_devices_keep_nothing(home, monkeypatch):
    assert compilation.keep_compiled("off") is None
    assert compilation.keep_compiled("") is None
    assert not jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    count = "--xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", count)
    assert compilation.keep_compiled() is None
    assert not jax.config.jax_enable_compilation_cache


def test_only_gathers_at_every_token_of_a_tpu_are_not_fused():
    def told(platform, sharding):
        device = types.SimpleNamespace(platform=platform)
        mesh = types.SimpleNamespace(devices=np.array([[device]]))
        return compilation.decoding_options(mesh, sharding)

    assert told("tpu", "train") == {
        "xla_tpu_enable_async_collective_fusion": False
    }
    assert not told("tpu", "rows") and not told("cpu", "train")
    assert not compilation.decoding_options(None, "train")


def test_another_machine_has_another_directory(monkeypatch):
    """And every process of one machine has the same."""
    line = "from topd_jax.parallel import compilation as it"
    told = run_script("-c", f"{line}; print(it.machine_key())")
    keys = [compilation.machine_key(), told.splitlines()[-1]]
    monkeypatch.setattr(compilation.platform, "machine", lambda: "another")
    assert keys == [keys[0]] * 2 and compilation.machine_key() != keys[0]


def test_programs_are_read_again_but_none_that_was_cut_short(home, monkeypatch):
    monkeypatch.setattr(compilation, "_WORTH_KEEPING", 0.0)
    folder = compilation.keep_compiled()
    compilation_cache.reset_cache()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    events = []

    def listen(name, **_):
        events.append(name.rsplit("/", 1)[-1])

    def run():
        programs = (lambda x: jnp.sin(x) @ x.T), (lambda x: jnp.cos(x) @ x.T)
        return [jax.jit(program)(x).tolist() for program in programs]

    jax.monitoring.register_event_listener(listen)
    try:
        first = run()
        assert "cache_hits" not in events
        one, _ = folder.glob("*-cache")
        data = one.read_bytes()
        one.write_bytes(data[: len(data) // 2])
        assert run() == first
        assert events.count("cache_hits") == 1
    finally:
        jax.monitoring.unregister_event_listener(listen)


def test_a_command_asks_as_its_settings_say(monkeypatch):
    asked, command = [], types.SimpleNamespace(
        load=lambda: lambda **_: "done", resumes=False
    )  # fmt: skip
    monkeypatch.setattr(compilation, "keep_compiled", asked.append)
    monkeypatch.setattr(main, "COMMANDS", {"doctor": command})
    main.run(["doctor", "--config", "tiny"])
    off = "--config.train.compilation_cache=off"
    main.run(["doctor", "--config", "tiny", off])
    assert asked == ["auto", "off"]


def test_equal_keywords_share_what_is_compiled_where_they_may():
    def scaled(x, *, scale):
        return x * scale

    def jitted(scale, shared=True, **told):
        scaled_by = functools.partial(scaled, scale=scale)
        return compilation.jitted(scaled_by, shared=shared, **told)

    one = jitted(2.0)
    assert one(3.0) == 6
    assert jitted(2.0) is one
    assert jitted(3.0) is not one and jitted(2.0, donate_argnums=0) is not one
    assert jitted(2.0, shared=False) is not one
    several = jitted(np.arange(3.0), shared=False)  # has no hash
    np.testing.assert_array_equal(several(jnp.ones(3)), [0, 1, 2])


def test_an_objective_of_the_packages_own_pieces_is_one():
    for text in ("entropy_aware", "opd(token_loss='jsd', beta=0.3)"):
        assert make_objective(text) is make_objective(text)
    own = "opd(token_loss='topd_jax.losses.divergences:generalized_jsd')"
    assert make_objective(own) is not make_objective(own)
