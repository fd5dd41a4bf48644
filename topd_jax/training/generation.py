"""``topd generate``: the teacher writes solutions of every prompt, once.

The off-policy data of stage 1 (arXiv:2606.00305, App. B: temperature 0.6,
top-p 0.95). A batch's randomness comes from (seed, its place), and every shard
is whole or absent: a job that is killed and started again ends with the same
bytes as one that is not.
"""

import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from topd_jax.data import prompts as prompt_data
from topd_jax.data import solutions as solution_data
from topd_jax.data import vocabulary
from topd_jax.data.prompts import EncodedPrompts, PromptBatch
from topd_jax.data.solutions import Solution, SolutionFiles
from topd_jax.data.templates import require_same_prompts
from topd_jax.evaluation.evaluator import write
from topd_jax.parallel import hosts, lock
from topd_jax.parallel.compilation import decoding_options
from topd_jax.parallel.sharding import spread_rows
from topd_jax.sampling import Stream, stream_key
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup, load_setup
from topd_jax.types import Trajectories


def generate(
    settings: Settings, workdir: pathlib.Path, count: int | None = None
) -> dict[str, Any]:
    """Write ``WORKDIR/solutions``; call it again to resume.

    Args:
      settings: of the teacher, the prompts, ``rollout.max_new_tokens`` and
        ``offline``.
      workdir: where the set is written.
      count: prompts, from the first on; None takes all.

    Returns:
      JSON-able: the set's path and contents (solutions, tokens, the shares
      that are truncated and, where known, correct), and of this call the
      tokens written, seconds and tokens a second.

    Raises:
      ValueError: for several teachers, or a set there of other settings.
    """
    if settings.teachers:
        raise ValueError(
            f"config.teachers names {', '.join(settings.teachers)}; topd "
            "generate lets one teacher write: config.teacher"
        )
    with lock.held(workdir):
        setup = load_setup(settings, workdir)
        # It was checked against the teacher, and writes nothing.
        setup.student = None
        require_same_prompts(setup.encoded.records, "topd generate")
        encoded = setup.encoded.take(range(len(setup.encoded.ids))[:count])
        about = _about(settings, setup, encoded)
        files = SolutionFiles(workdir / "solutions", about["shards"])
        missing = hosts.from_first(
            lambda: solution_data.open_set(files.folder, about).missing()
        )
        with jax.set_mesh(setup.mesh):
            tokens, seconds = _write_missing(
                settings, setup, encoded, files, set(missing)
            )
        told = hosts.from_first(lambda: _summary(files))
    return {
        "path": str(files.folder),
        **told,
        "tokens_now": tokens,
        "seconds": seconds,
        "rate_tokens": tokens / seconds if tokens else None,
    }


def _about(
    settings: Settings, setup: Setup, encoded: EncodedPrompts
) -> dict[str, Any]:
    """Return what decides the bytes of the set."""
    data, offline = settings.data, settings.offline
    batches = -(-len(encoded.ids) // data.batch_size)
    return {
        "shards": -(-batches // _batches_a_shard(settings)),
        "shard_size": offline.shard_size,
        "prompts": len(encoded.ids),
        "samples": data.samples,
        "batch_size": data.batch_size,
        "seed": settings.seed,
        "temperature": offline.temperature,
        "top_p": offline.top_p,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "teacher": setup.teacher_fingerprints[""],
        "tokenizer": vocabulary.fingerprint(setup.tokenizer),
        "prompt_tokens": encoded.fingerprint(),
        # Sets of before slots were have no such entry.
        **({"slots": slots} if (slots := settings.rollout.slots) else {}),
    }


def _batches_a_shard(settings: Settings) -> int:
    rows = settings.data.batch_size * settings.data.samples
    return -(-settings.offline.shard_size // rows)


def _write_missing(
    settings: Settings,
    setup: Setup,
    encoded: EncodedPrompts,
    files: SolutionFiles,
    missing: set[int],
) -> tuple[int, float]:
    """Write the shards that are missing; return (tokens, seconds)."""
    size = _batches_a_shard(settings)
    batches = [
        (i, batch)
        for i, batch in enumerate(
            prompt_data.ordered_batches(
                encoded, batch_size=settings.data.batch_size
            )
        )
        if i // size in missing
    ]
    started, tokens = time.perf_counter(), 0
    shard: list[Solution] = []

    def keep(
        i: int, batch: PromptBatch, rows: Trajectories, ends: bool
    ) -> None:
        shard.extend(_solutions(settings, setup, encoded, batch, rows))
        if ends:
            lock.confirm()
            files.write(i // size, shard)
            shard.clear()

    bar = tqdm(
        total=len(encoded.ids), unit="prompt", desc="generate", mininterval=1.0,
        initial=len(encoded.ids) - sum(_real(b) for _, b in batches),
        disable=not hosts.is_first(),
    )  # fmt: skip
    with bar:
        written = _written(settings, setup, batches)
        for place, (i, batch, rows) in enumerate(written):
            last = place + 1 == len(batches)
            ends = last or batches[place + 1][0] // size != i // size
            hosts.from_first(functools.partial(keep, i, batch, rows, ends))
            tokens += int(
                rows.mask[: _real(batch) * settings.data.samples].sum()
            )
            rate = tokens / (time.perf_counter() - started)
            bar.set_postfix(tokens_s=f"{rate:.0f}", refresh=False)
            bar.update(_real(batch))
    return tokens, time.perf_counter() - started


def _real(batch: PromptBatch) -> int:
    """Return the prompts of a batch, without those that only fill it."""
    return int((batch.index >= 0).sum())


def _written(
    settings: Settings, setup: Setup, batches: list[tuple[int, PromptBatch]]
) -> Iterator[tuple[int, PromptBatch, Trajectories]]:
    """Yield each batch, in order, with what the teacher wrote (NumPy)."""
    tokenizer = setup.tokenizer
    (teacher,) = setup.teachers
    key = stream_key(jax.random.key(settings.seed), Stream.GENERATE)
    writer = jax.jit(
        functools.partial(
            write,
            options=settings.writing,
            # Rows beyond it are padding, and may be missing in the student.
            vocab_size=tokenizer.vocab_size,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            samples=settings.data.samples,
        ),
        # Whole in every process, before the next batch is dispatched.
        out_shardings=NamedSharding(setup.mesh, PartitionSpec()),
        compiler_options=decoding_options(
            setup.mesh, settings.writing.sharding
        ),
    )

    def begin(place: int) -> Trajectories:
        i, batch = batches[place]
        prompts = spread_rows(batch.prompts, setup.mesh)
        return writer(teacher.model, prompts, jax.random.fold_in(key, i))

    # Dispatch the next batch before reading this one: the device writes while
    # the host decodes and grades.
    pending = begin(0) if batches else None
    for place, (i, batch) in enumerate(batches):
        rows = pending
        pending = begin(place + 1) if place + 1 < len(batches) else None
        yield i, batch, hosts.on_host(rows)


def _solutions(
    settings: Settings,
    setup: Setup,
    encoded: EncodedPrompts,
    batch: PromptBatch,
    rows: Trajectories,
) -> list[Solution]:
    """Return a batch's rows as records, graded where answers are known."""
    samples = settings.data.samples
    out = []
    for row in range(_real(batch) * samples):
        index = int(batch.index[row // samples])
        record, mask = encoded.records[index], rows.mask[row]
        tokens = rows.tokens[row][mask]
        out.append(
            Solution(
                index=index,
                sample=row % samples,
                prompt=record["prompt"],
                answer=record["answer"],
                completion=setup.tokenizer.decode(tokens.tolist()),
                prompt_tokens=encoded.ids[index],
                completion_tokens=tokens,
                truncated=bool(rows.truncated[row]),
                logp_mean=float(np.float32(rows.logp[row][mask].mean())),
                correct=None,
            )
        )
    # Some tasks of reasoning-gym have no answer, but all have a grader.
    known = [
        s for s in out if s["answer"] or "task" in encoded.records[s["index"]]
    ]
    grades = setup.grade(
        [encoded.records[s["index"]] for s in known],
        [s["completion"] for s in known],
    )
    for solution, grade in zip(known, grades or [], strict=False):
        solution["correct"] = grade
    return out


def _summary(files: SolutionFiles) -> dict[str, Any]:
    """Return the numbers of the set, read back from its files."""
    solutions = tokens = cut = known = correct = 0
    for shard in range(files.shards):
        for solution in files.read(shard):
            solutions += 1
            tokens += len(solution["completion_tokens"])
            cut += solution["truncated"]
            known += solution["correct"] is not None
            correct += bool(solution["correct"])
    return {
        "solutions": solutions,
        "tokens": tokens,
        "truncated": cut / solutions,
        "exact_match": correct / known if known else None,
    }
