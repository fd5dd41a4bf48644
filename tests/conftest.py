"""Small models and trajectories that many tests share."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

# Tests never need more than a CPU, wherever they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many runs here are the same program again, in this process or in a child:
# what one has compiled, the next one reads.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="topd-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import starts_with
from orbax.checkpoint import type_handlers

from topd_jax.models import Decoder, DecoderConfig, init_decoder
from topd_jax.types import Teacher, Trajectories

# Most of the time here goes into compiling what runs for an instant.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
VOCAB = 40
EOS = 2
PAD = 0


def pytest_configure(config: pytest.Config) -> None:
    """Compiles quickly, not well; with TOPD_TESTS=optimized as users do."""
    if os.environ.get("TOPD_TESTS") == "optimized":
        return
    if hasattr(config, "workerinput"):
        return  # a worker has its parent's environment
    if os.environ["JAX_PLATFORMS"] != "cpu":
        return  # the flags are the CPU's
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    if starts_with(flags):  # a flag that XLA has no longer ends the process
        os.environ["XLA_FLAGS"] = flags


def make_model(seed: int, layers: int = 2, width: int = 16) -> Decoder:
    """A random decoder of a few thousand parameters."""
    config = DecoderConfig(
        vocab_size=VOCAB,
        layers=layers,
        width=width,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=32,
        unroll=layers,
    )
    return jax.jit(init_decoder, static_argnums=0)(config, jax.random.key(seed))


def make_trajectories(
    rows: int = 8, prompt: int = 5, completion: int = 12, seed: int = 0
) -> Trajectories:
    """Random rows of different lengths, as a rollout lays them out."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(2, prompt + 1, rows)
    lengths = rng.integers(4, completion + 1, rows)
    prompt_mask = np.arange(prompt) >= prompt - prompt_lengths[:, None]
    mask = np.arange(completion) < lengths[:, None]
    tokens = rng.integers(3, VOCAB, (rows, completion))
    ended = lengths < completion
    tokens[np.arange(rows)[ended], lengths[ended] - 1] = EOS
    return Trajectories(
        prompt=jnp.asarray(
            np.where(prompt_mask, rng.integers(3, VOCAB, (rows, prompt)), PAD),
            jnp.int32,
        ),
        prompt_mask=jnp.asarray(prompt_mask),
        tokens=jnp.asarray(np.where(mask, tokens, PAD), jnp.int32),
        mask=jnp.asarray(mask),
        logp=jnp.zeros((rows, completion)),
        truncated=jnp.asarray(~ended),
    )


def pytest_collection_finish() -> None:
    """Spares what is imported by now the search for garbage: a second each."""
    gc.collect()
    gc.freeze()


def much_is_held() -> bool:
    """Whether it is a third of the maps that Linux grants, or 3 GB."""
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return True
    return maps > most / 3 or pages * os.sysconf("SC_PAGE_SIZE") > 3e9


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """Each keeps mapped memory, and a process with too much is aborted."""
    yield
    if much_is_held():
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def world_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small world's models are kept; made by the first who asks.

    Processes that share the tests share it, and wait for one another.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    (base / "small-world").mkdir(exist_ok=True)
    return base / "small-world"


@pytest.fixture(scope="session")
def small_arguments(world_cache: Path) -> list[str]:
    """What the command line is told for a run that takes seconds."""
    config = Path(__file__).parent / "small_run.py"
    return [f"--config={config}", f"--config.world.cache={world_cache}"]


@pytest.fixture(scope="session")
def settings(world_cache: Path):
    """Those of the small run, where a file has no others."""
    from small_run import settings_with

    return settings_with(world_cache)


@pytest.fixture(scope="module")
def setup(settings, tmp_path_factory: pytest.TempPathFactory):
    """What a run with the file's settings is made of."""
    from topd_jax.training.setup import load_setup

    return load_setup(settings, tmp_path_factory.mktemp("setup"))


@pytest.fixture(scope="session")
def trained(
    world_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The work directory of a small run that nothing disturbed; read only."""
    from small_run import settings_with

    from topd_jax.training.loop import train

    workdir = tmp_path_factory.mktemp("trained")
    train(settings_with(world_cache), workdir)
    return workdir


@pytest.fixture(scope="session")
def pairs() -> list[tuple[str, str]]:
    """Problems of the tiny world with solutions as its student writes them."""
    from topd_jax.data.toy_world import problems

    sample = problems.problems("train", 400, seed=0)
    return problems.world_pairs(
        sample, problems.STUDENT_STYLE, problems.STUDENT_HABIT, seed=1
    )


@pytest.fixture(scope="session")
def tokenizer(pairs: list[tuple[str, str]]):
    """The tokenizer of the tiny world."""
    from topd_jax.data.toy_world.models import train_tokenizer

    return train_tokenizer(pairs)


@pytest.fixture(scope="session")
def written(
    world_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Solutions of 64 prompts in 4 shards: work directory, and summary."""
    from small_run import settings_with

    from topd_jax.training.generation import generate

    workdir = tmp_path_factory.mktemp("written")
    settings = settings_with(world_cache, offline__shard_size=16)
    return workdir, generate(settings, workdir)


@pytest.fixture
def topd(capsys):
    """Runs the command line; returns what it printed on stdout."""
    from topd_jax.cli import main

    def run(*arguments: object) -> str:
        capsys.readouterr()
        main.run([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Runs what must be refused; returns the one line on stderr."""
    from topd_jax.cli import main

    def run(*arguments: object, bars: bool = False) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main.run([str(a) for a in arguments])
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert out == ""
        lines = err.splitlines()
        if not bars:  # those of a run that had begun come before
            assert len(lines) == 1, err
        assert lines[-1].startswith("topd: ")
        return lines[-1]

    return run


@pytest.fixture
def command(small_arguments, tmp_path):
    """(name, *more) -> a whole command line in an empty work directory."""

    def make_line(name: str, *more: str) -> list[str]:
        return [name, *small_arguments, f"--workdir={tmp_path / 'run'}", *more]

    return make_line


@pytest.fixture(scope="session")
def student() -> Decoder:
    return make_model(0)


@pytest.fixture(scope="session")
def teacher() -> Decoder:
    return make_model(1, layers=3, width=24)


@pytest.fixture(scope="session")
def teachers(teacher) -> tuple[Teacher, Teacher]:
    """Two, of one and three prompts of four."""
    other = make_model(2, layers=1, width=32)
    return Teacher(teacher, "code", 1), Teacher(other, "math", 3)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def trajectories() -> Trajectories:
    return make_trajectories()


@pytest.fixture
def asked(monkeypatch):
    """The arrays of checkpoints that are read from now on, by name."""
    handler, names = type_handlers.ArrayHandler, []
    plain = handler.deserialize

    async def watched(self, infos, args=None):
        names.extend(info.name for info in infos)
        return await plain(self, infos, args)

    monkeypatch.setattr(handler, "deserialize", watched)
    return names
