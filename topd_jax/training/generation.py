"""``topd generate``: the teacher writes solutions, once for every prompt.

The off-policy data of stage 1 (arXiv:2606.00305, App. B: temperature 0.6,
top-p 0.95). A batch's randomness comes from (seed, its place), and shards are
whole or absent: a job that was killed goes on where it was and ends with the
same bytes as one that was not.
"""

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from topd_jax.data import prompts as prompt_data
from topd_jax.data import solutions as solution_data
from topd_jax.data import vocabulary
from topd_jax.data.prompts import EncodedPrompts, PromptBatch
from topd_jax.data.solutions import Solution, SolutionFiles
from topd_jax.models.decoder import cast
from topd_jax.sampling import rollout
from topd_jax.training.config import Settings
from topd_jax.training.setup import Pair, load_pair
from topd_jax.types import Trajectories

# Apart from the keys of training steps and of evaluations.
_STREAM = 2**31 - 2


def generate(
    settings: Settings, workdir: pathlib.Path, count: int | None = None
) -> dict[str, Any]:
    """Writes ``WORKDIR/solutions``; the same command again resumes.

    Args:
      settings: of the teacher, the prompts, ``rollout.max_new_tokens`` and
        ``offline``.
      workdir: where the set is written.
      count: prompts, from the first on; None takes them all.

    Returns:
      JSON-able: the set's path and what it holds (solutions, tokens, the
      shares that are truncated and, where known, correct), and of this call
      the tokens written, seconds and tokens a second.

    Raises:
      ValueError: for several teachers, or a set there that was begun with
        other settings.
    """
    if settings.teachers:
        raise ValueError(
            f"config.teachers names {', '.join(settings.teachers)}; topd "
            "generate lets one teacher write: config.teacher"
        )
    pair = load_pair(settings, workdir)
    # It is here to be checked against the teacher, and writes nothing.
    pair.student = None
    encoded = pair.encoded.take(range(len(pair.encoded.ids))[:count])
    about = _about(settings, pair, encoded)
    files = solution_data.open_set(workdir / "solutions", about)
    with jax.set_mesh(pair.mesh):
        tokens, seconds = _write_missing(settings, pair, encoded, files)
    files.finish(_shard_lengths(settings, len(encoded.ids), files.shards))
    return {
        "path": str(files.folder),
        **_summary(files),
        "tokens_now": tokens,
        "seconds": seconds,
        "rate_tokens": tokens / seconds if tokens else None,
    }


def _about(
    settings: Settings, pair: Pair, encoded: EncodedPrompts
) -> dict[str, Any]:
    """What the set is made of: with the same, the bytes are the same."""
    data, offline = settings.data, settings.offline
    batches = -(-len(encoded.ids) // data.batch_size)
    return {
        "format": offline.format,
        "shards": -(-batches // _batches_a_shard(settings)),
        "shard_size": offline.shard_size,
        "prompts": len(encoded.ids),
        "samples": data.samples,
        "batch_size": data.batch_size,
        "seed": settings.seed,
        "temperature": offline.temperature,
        "top_p": offline.top_p,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "teacher": pair.teacher_fingerprint,
        "tokenizer": vocabulary.fingerprint(pair.tokenizer),
        "prompt_tokens": encoded.fingerprint(),
    }


def _batches_a_shard(settings: Settings) -> int:
    rows = settings.data.batch_size * settings.data.samples
    return -(-settings.offline.shard_size // rows)


def _shard_lengths(settings: Settings, prompts: int, shards: int) -> list[int]:
    """Solutions of each shard."""
    most = _batches_a_shard(settings) * settings.data.batch_size
    return [
        min(most, prompts - i * most) * settings.data.samples
        for i in range(shards)
    ]


def _write_missing(
    settings: Settings,
    pair: Pair,
    encoded: EncodedPrompts,
    files: SolutionFiles,
) -> tuple[int, float]:
    """Writes the shards that are missing; (tokens, seconds) it took."""
    missing, size = set(files.missing()), _batches_a_shard(settings)
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
    bar = tqdm(
        total=len(encoded.ids), unit="prompt", desc="generate", mininterval=1.0,
        initial=len(encoded.ids) - sum(_real(b) for _, b in batches),
    )  # fmt: skip
    with bar:
        written = _written(settings, pair, batches)
        for place, (i, batch, rows) in enumerate(written):
            shard += _solutions(settings, pair, encoded, batch, rows)
            tokens += int(
                rows.mask[: _real(batch) * settings.data.samples].sum()
            )
            last = place + 1 == len(batches)
            if last or batches[place + 1][0] // size != i // size:
                files.write(i // size, shard)
                shard = []
            rate = tokens / (time.perf_counter() - started)
            bar.set_postfix(tokens_s=f"{rate:.0f}", refresh=False)
            bar.update(_real(batch))
    return tokens, time.perf_counter() - started


def _real(batch: PromptBatch) -> int:
    """Prompts of a batch that do not only fill it."""
    return int((batch.index >= 0).sum())


def _written(
    settings: Settings, pair: Pair, batches: list[tuple[int, PromptBatch]]
) -> Iterator[tuple[int, PromptBatch, Trajectories]]:
    """Lets the teacher write; each batch as NumPy arrays, in order."""
    ids = dict(eos_ids=pair.tokenizer.eos_ids, pad_id=pair.tokenizer.pad_id)
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAM)

    @jax.jit
    def write(teacher: Any, prompts: Any, key: jax.Array) -> Trajectories:
        return rollout(
            cast(teacher, teacher.config.dtype),
            prompts,
            key,
            max_new_tokens=settings.rollout.max_new_tokens,
            temperature=settings.offline.temperature,
            top_p=settings.offline.top_p,
            samples=settings.data.samples,
            # Rows beyond it are padding, and may be missing in the student.
            vocab_size=pair.tokenizer.vocab_size,
            **ids,
        )

    def begin(place: int) -> Trajectories:
        i, batch = batches[place]
        return write(
            pair.teacher,
            pair.spread(batch.prompts),
            jax.random.fold_in(key, i),
        )

    # The next batch is dispatched before this one is read: the device writes
    # while the host decodes and grades.
    pending = begin(0) if batches else None
    for place, (i, batch) in enumerate(batches):
        rows = pending
        pending = begin(place + 1) if place + 1 < len(batches) else None
        yield i, batch, jax.device_get(rows)


def _solutions(
    settings: Settings,
    pair: Pair,
    encoded: EncodedPrompts,
    batch: PromptBatch,
    rows: Trajectories,
) -> list[Solution]:
    """The rows of a batch as records, graded where that can be."""
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
                completion=pair.tokenizer.decode(tokens.tolist()),
                prompt_tokens=encoded.ids[index],
                completion_tokens=tokens,
                truncated=bool(rows.truncated[row]),
                logp_mean=float(np.float32(rows.logp[row][mask].mean())),
                correct=None,
            )
        )
    known = [s for s in out if s["answer"]]
    grades = pair.grade(
        [encoded.records[s["index"]] for s in known],
        [s["completion"] for s in known],
    )
    for solution, grade in zip(known, grades or [], strict=False):
        solution["correct"] = grade
    return out


def _summary(files: SolutionFiles) -> dict[str, Any]:
    """What the set holds, read back from its files."""
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
