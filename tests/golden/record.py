"""Record today's numbers, so that another version can be compared with them.

    python tests/golden/record.py objectives   # writes objectives.npz
    python tests/golden/record.py steps        # writes steps.json

PYTHONPATH selects the code. The first part, up to "Objectives", is all that
knows how the code is called: port it, and nothing else, when the calls change.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topd_jax import (
    Teacher,
    Trajectories,
    init_state,
    make_objective,
    score,
    train_step,
)
from topd_jax.cli import main as command_line
from topd_jax.data.packing import rows_of
from topd_jax.models import (
    Decoder,
    DecoderConfig,
    parameter_table,
)
from topd_jax.training.sft import read_rows, sft_step

HERE = pathlib.Path(__file__).resolve().parent
SMALL_RUN = HERE.parent / "small_run.py"
EOS, PAD, VOCAB = 2, 0, 24
SEED = 46  # bfloat16 and float32 then decide alike on every case

# --------------------------------------------------------------------------
# What depends on how the code is called, imports included.

_AHEAD = "candidates=3, window=4"
_TOPD = f"{_AHEAD}, branch_fraction=1.0, guidance_weight=0.3"
# Case -> the objective as a config spells it.
CASES: dict[str, str] = {
    "opd": "opd",
    "opd+suppress": f"suppress({_AHEAD})",
    "opd+suppress_control": f"suppress_control({_AHEAD})",
    "n_step": f"n_step({_AHEAD}, n=3, discount=0.5, strength=2.0, cap=2.5)",
    "topd/teacher": f"topd({_TOPD})",
    "topd/student": f"topd({_TOPD}, context='student')",
    "topd+suppress/teacher": f"topd_suppress({_TOPD})",
    "topd+suppress/student": f"topd_suppress({_TOPD}, context='student')",
    "entropy_aware": "entropy_aware(top_k=4, entropy_threshold=2.0)",
    "trust_region": "trust_region(top_k=4)",
    "tip": "tip",
    "teachability": "teachability(top_k=4)",
    "fire": "fire",
    "agreement": "agreement(window=3)",
    "prefix": "prefix",
    "opd, forward_kl": "opd(token_loss='forward_kl')",
    "opd+suppress, jsd": f"suppress({_AHEAD}, token_loss='jsd', beta=0.3)",
    "topd, score=reverse_kl": f"topd({_TOPD}, ranking='token_loss')",
    "topd, detector=future_loss": f"topd({_TOPD}, detector='future_loss')",
    "n_step, detector=future_loss": (
        f"n_step({_AHEAD}, n=3, discount=0.5, strength=2.0, cap=2.5, "
        "detector='future_loss')"
    ),
    "topd, branch_loss=forward_kl": f"topd({_TOPD}, branch_loss='forward_kl')",
    "topd, branch_loss=reverse_kl": f"topd({_TOPD}, branch_loss='reverse_kl')",
    "topd, sampled branches": f"topd({_TOPD}, branch_temperature=1.0)",
    "opd, temperature=0.7": "opd(temperature=0.7)",
    "topd/student, temperature=2": (
        f"topd({_TOPD}, context='student', temperature=2.0)"
    ),
    "topd, threshold=0.6": f"topd({_TOPD}, threshold=0.6)",
    "topd, fraction=0.2": f"topd({_TOPD}, fraction=0.2)",
    "topd/student, anchor_first=False": (
        f"topd({_TOPD}, context='student', anchor_first=False)"
    ),
    "topd/student, position_weight=0": (
        f"topd({_TOPD}, context='student', position_weight=0.0)"
    ),
    "topd, larger teacher vocabulary": (
        f"topd({_TOPD}, branch_loss='reverse_kl')"
    ),
    "topd, accumulate=2": f"topd({_TOPD})",
    "offline, kd_ratio=0.3": "",
}
# In bfloat16, what a path through models and losses of its own needs.
CASES_IN = {
    "float32": tuple(CASES),
    "bfloat16": ("topd/teacher", "topd/student", "opd", "tip"),
}
TEACHER_VOCAB = {"topd, larger teacher vocabulary": VOCAB + 3}
ACCUMULATE = {"topd, accumulate=2": 2}
KD_RATIO = {"offline, kd_ratio=0.3": 0.3}
# The metrics that are recorded.
METRICS = (
    "loss", "grad_norm", "skipped", "divergence", "guidance",
    "cross_entropy", "teacher_token_loss", "distance", "divergent",
    "candidates", "length_mean", "length_min", "length_max", "truncated",
    "num_tokens",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames="case")
def compute_case(
    case: str, student: Any, teacher: Any, trajectories: Any, key: jax.Array
) -> tuple[dict, dict, dict]:
    """Score the trajectories, take one step.

    Returns:
      (scores name -> array or None, metrics name -> (sum, count), gradient as
      parameter name -> array).
    """
    # This "optimizer" keeps the gradient itself as its state.
    keep = optax.trace(decay=0.0)
    state, teachers = init_state(student, keep), (Teacher(teacher),)
    if case in KD_RATIO:
        rows = rows_of(trajectories)
        state, metrics = sft_step(
            state, rows, read_rows(student, teachers, rows),
            kd_ratio=KD_RATIO[case], optimizer=keep,
        )  # fmt: skip
        return {}, metrics, state.opt_state.trace.arrays
    objective = make_objective(CASES[case])
    scored = score(
        student, teachers, trajectories, key, objective=objective,
        eos_ids=(EOS,), pad_id=PAD,
    )  # fmt: skip
    state, metrics = train_step(
        state, trajectories, scored, objective=objective, optimizer=keep,
        accumulate=ACCUMULATE.get(case, 1),
    )  # fmt: skip
    (notes,) = scored
    candidates, ours = notes.candidates, notes.student_windows
    theirs = notes.teacher_windows
    named = {
        "teacher_token_loss": notes.teacher_token_loss,
        "candidate_positions": candidates and candidates.positions,
        "candidate_mask": candidates and candidates.mask,
        "student_window_tokens": ours and ours.tokens,
        "student_window_mask": ours and ours.mask,
        "teacher_window_tokens": theirs and theirs.tokens,
        "teacher_window_mask": theirs and theirs.mask,
        "distance": notes.distance,
        "plan": notes.plan,
        "divergent": notes.divergent,
        "false_alarm": notes.false_alarm,
        "capped": notes.selected,
        "token_weights": notes.weights,
        "uniforms": notes.uniforms,
    }
    return named, metrics, state.opt_state.trace.arrays


def build_decoder(seed: int, **fields: Any) -> Any:
    """Return a decoder whose parameters numpy draws, name by name."""
    config = DecoderConfig(**fields)
    arrays = {}
    for name, row in parameter_table(config).items():
        # By name, so that their order does not matter.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise = rng.normal(size=row.shape)
        if row.scale is None:
            value = row.start + 0.1 * noise
        elif name in ("embedding", "output"):
            value = 2.5 * row.scale * noise  # logits that differ clearly
        else:
            value = row.scale * noise
        arrays[name] = jnp.asarray(value, jnp.float32)
    return Decoder(config, arrays)


# Run -> what `topd train` is told beside `small_flags`. One objective: of the
# others, the cases above record a step.
_SMALL = "candidates=2, window=4, branch_fraction=1.0, guidance_weight=0.3"
ON_MESH = "topd/teacher, 2 x 2 mesh"
RUNS = {"topd/teacher": [f"--config.objective=topd({_SMALL})"]}
RUNS[ON_MESH] = [
    *RUNS["topd/teacher"], "--config.mesh.data=2", "--config.mesh.fsdp=2"
]  # fmt: skip


def small_flags(cache: pathlib.Path) -> list[str]:
    """Return what makes a run take seconds: 20 steps, barely trained models."""
    small = {
        "world.cache": cache, "world.teacher_steps": 300,
        "world.student_steps": 100, "train.steps": 20,
        "optimizer.learning_rate": 1e-3, "checkpoint.every": 10,
        "log.statistics_every": 10, "log.completions_every": 20,
        "eval.every": 10, "eval.problems": 16, "eval.final_problems": 64,
        "eval.batch_size": 16,
    }  # fmt: skip
    changes = [f"--config.{name}={value}" for name, value in small.items()]
    return [f"--config={SMALL_RUN}", *changes]


def train(run: str, workdir: pathlib.Path, cache: pathlib.Path) -> None:
    """Train through the command line."""
    flags = [*small_flags(cache), f"--workdir={workdir}", *RUNS[run]]
    with contextlib.redirect_stdout(sys.stderr):
        command_line.run(["train", *flags])


# --------------------------------------------------------------------------
# Objectives: loss, sums, gradient, scores of every case.


def make_models(dtype: str, teacher_vocab: int, seed: int = SEED) -> tuple:
    """Return the tiny student and teacher."""
    shape = dict(kv_heads=1, head_dim=4, dtype=dtype)
    student = build_decoder(
        seed, vocab_size=VOCAB, layers=2, width=8, heads=2, mlp_width=12,
        **shape,
    )  # fmt: skip
    teacher = build_decoder(
        seed + 1, vocab_size=teacher_vocab, layers=2, width=12, heads=3,
        mlp_width=16, tied=False, **shape,
    )  # fmt: skip
    return student, teacher


def make_batch(seed: int = SEED) -> Any:
    """Return trajectories of different lengths, one of them truncated."""
    rng = np.random.default_rng(seed)
    prompts, lengths = np.array([2, 4, 3, 1]), np.array([10, 7, 9, 5])
    rows, prompt, completion = 4, 4, 10
    prompt_mask = np.arange(prompt) >= prompt - prompts[:, None]
    mask = np.arange(completion) < lengths[:, None]
    tokens = rng.integers(3, VOCAB, (rows, completion))
    tokens[np.arange(rows)[1:], lengths[1:] - 1] = EOS
    written = rng.integers(3, VOCAB, (rows, prompt))
    return Trajectories(
        prompt=jnp.asarray(np.where(prompt_mask, written, PAD), jnp.int32),
        prompt_mask=jnp.asarray(prompt_mask),
        tokens=jnp.asarray(np.where(mask, tokens, PAD), jnp.int32),
        mask=jnp.asarray(mask),
        logp=jnp.asarray(-rng.random((rows, completion)) * mask, jnp.float32),
        truncated=jnp.asarray(lengths == completion),
    )


def compute(case: str, dtype: str, seed: int = SEED) -> dict[str, np.ndarray]:
    """Return every number of a case, name -> f32 array.

    Args:
      case: of CASES.
      dtype: in which the models compute.
      seed: of models and trajectories.

    Returns:
      "metric/NAME" -> (sum, count); "score/NAME" -> annotation;
      "gradient/PARAMETER" -> gradient. What a case does not have is missing.
    """
    teacher_vocab = TEACHER_VOCAB.get(case, VOCAB)
    student, teacher = make_models(dtype, teacher_vocab, seed)
    scored, metrics, gradient = compute_case(
        case, student, teacher, make_batch(seed), jax.random.key(7)
    )
    out = {
        f"metric/{n}": np.stack(v) for n, v in metrics.items() if n in METRICS
    }
    out |= {f"score/{n}": v for n, v in scored.items() if v is not None}
    out |= {f"gradient/{n}": v for n, v in gradient.items()}
    return {n: np.asarray(v, np.float32) for n, v in out.items()}


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack what several cases computed; NaN where one has no such value."""
    shapes = {name: value.shape for row in rows for name, value in row.items()}
    return {
        name: np.stack(
            [row.get(name, np.full(s, np.nan, "f4")) for row in rows]
        )
        for name, s in shapes.items()
    }


def record_objectives(path: pathlib.Path) -> None:
    """Write the cases of every dtype to one npz file."""
    out: dict[str, np.ndarray] = {}
    for dtype, cases in CASES_IN.items():
        out[f"{dtype}/cases"] = np.array(cases)
        stacked = stack([compute(case, dtype) for case in cases])
        for name, values in stacked.items():
            short = dtype != "float32" and name.startswith("gradient")
            out[f"{dtype}/{name}"] = values.astype("f2") if short else values
    np.savez_compressed(path, **out)


def read_objectives(path: pathlib.Path) -> dict[tuple[str, str], dict]:
    """Return (case, dtype) -> what :func:`compute` gave when recorded."""
    with np.load(path) as file:
        arrays = dict(file)
    cases = {dtype: arrays.pop(f"{dtype}/cases") for dtype in CASES_IN}
    out: dict[tuple[str, str], dict] = {}
    for name, values in arrays.items():
        dtype, _, what = name.partition("/")
        for case, value in zip(cases[dtype].tolist(), values, strict=True):
            if not np.isnan(value).all():
                out.setdefault((case, dtype), {})[what] = value
    return out


# --------------------------------------------------------------------------
# Steps: 20 of a small run, and of one on a mesh.


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a log without its times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = ("seconds", "rate")
    return [
        {k: v for k, v in row.items() if not k.startswith(times)}
        for row in rows
    ]


def run_logs(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Return the numbers that a run logged: "steps" and "evals"."""
    return {
        "steps": read_log(workdir / "metrics.jsonl"),
        "evals": read_log(workdir / "evals.jsonl"),
    }


def train_apart(
    run: str, workdir: pathlib.Path, cache: pathlib.Path, devices: int
) -> None:
    """Train in a process of its own, on so many simulated devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    subprocess.run(
        [sys.executable, __file__, "run", run, str(workdir), str(cache)],
        env=os.environ | {"XLA_FLAGS": flags},
        check=True,
    )


def compute_steps(folder: pathlib.Path) -> dict[str, Any]:
    """Run everything; return run -> its logs."""
    cache, out = folder / "world", {}
    for run in RUNS:
        workdir = folder / run.replace("/", "-")
        if run == ON_MESH:
            train_apart(run, workdir, cache, devices=4)
        else:
            train(run, workdir, cache)
        out[run] = run_logs(workdir)
    return out


def record_steps(path: pathlib.Path) -> None:
    """Write the logs of every run to one JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        out = compute_steps(pathlib.Path(folder))
    path.write_text(json.dumps(out, indent=1) + "\n")


def main() -> None:
    """Record what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("objectives", "steps", "run"))
    parser.add_argument("rest", nargs="*", help="of run: RUN WORKDIR CACHE")
    given = parser.parse_args()
    if given.what == "objectives":
        record_objectives(HERE / "objectives.npz")
    elif given.what == "steps":
        record_steps(HERE / "steps.json")
    else:
        run, workdir, cache = given.rest
        train(run, pathlib.Path(workdir), pathlib.Path(cache))


if __name__ == "__main__":
    main()
