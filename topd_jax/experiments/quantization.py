"""What a smaller teacher costs: its bytes, and the reverse KL it teaches.

The student writes on held-out prompts; the same teacher reads that text as it
was loaded, in bfloat16, in int8 and in int4, and student and teacher are
compared token by token each time. Ours.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from topd_jax.data.prompts import ordered_batches
from topd_jax.evaluation.evaluator import make_statistics
from topd_jax.losses import fused
from topd_jax.models.attention.masks import causal_spans
from topd_jax.models.decoder import Decoder, cast
from topd_jax.models.quantization import (
    KINDS,
    parameter_bytes,
    quantize,
    require_floats,
)
from topd_jax.sampling import rollout
from topd_jax.training.config import Settings
from topd_jax.training.logging import merge, read_metrics
from topd_jax.training.setup import Pair
from topd_jax.training.teachers import shared_rows
from topd_jax.types import Trajectories, completion_states

# Apart from the streams of training, evaluation, detection and looking.
_STREAM = 2**31 - 5


def smaller_teachers(
    teacher: Decoder, tile: int
) -> Iterator[tuple[str, Decoder]]:
    """The teacher as it is, in bfloat16, and as integers, one after another.

    Args:
      teacher: of float parameters.
      tile: inputs that share a scale; 0 takes each kind's default.

    Yields:
      (name, teacher); the first is the given one, called by its parameters'
      dtype.
    """
    dtype = teacher.config.param_dtype
    yield dtype, teacher
    if (teacher.config.dtype, dtype) != ("bfloat16", "bfloat16"):
        yield "bfloat16", jax.jit(cast, static_argnums=1)(teacher, "bfloat16")
    for kind in KINDS:
        yield kind, quantize(teacher, kind, tile)


def measure(
    settings: Settings, pair: Pair, student: Any, count: int
) -> list[dict[str, Any]]:
    """Compares the smaller teachers with the one that was loaded.

    Args:
      settings: of the run; ``rollout`` says how the student writes.
      pair: of the run; its teacher's parameters must be floats.
      student: the model that writes.
      count: held-out prompts, one completion each.

    Returns:
      One dictionary a teacher: "teacher"; "bytes" of its parameters (two int4
      a byte) and "buffer_bytes", what this backend's buffers take; "tokens";
      "kl", KL(loaded || this) in nats a token; "reverse_kl" of the student,
      nats a token; "change" of it against the loaded teacher, and
      "relative_change".

    Raises:
      ValueError: where the teacher was loaded quantised, or there are several.
    """
    if not isinstance(pair.teacher, Decoder):
        raise ValueError(
            "topd quantize measures one decoder; leave config.teachers out and "
            "give each of them as config.teacher in turn"
        )
    require_floats(pair.teacher, "measure what it costs to quantise")
    written = list(_written(settings, pair, student, count))
    compare, distance = make_statistics(settings), jax.jit(_distance)
    rows: list[dict[str, Any]] = []
    tile = settings.teacher.quantize_tile
    for name, teacher in smaller_teachers(pair.teacher, tile):
        found = [
            {
                "reverse_kl": compare(student, teacher, t)["reverse_kl"],
                "kl": distance(pair.teacher, teacher, t),
            }
            for t in written
        ]
        numbers = read_metrics(merge(found))
        first = rows[0]["reverse_kl"] if rows else numbers["reverse_kl"]
        change = numbers["reverse_kl"] - first
        rows.append(
            {
                "teacher": name,
                "bytes": parameter_bytes(teacher),
                "buffer_bytes": _buffer_bytes(teacher),
                "tokens": int(sum(t.mask.sum() for t in written)),
                "kl": numbers["kl"],
                "reverse_kl": numbers["reverse_kl"],
                "change": change,
                "relative_change": change / first if first else 0.0,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`measure` for people, as a Markdown table."""
    lines = [
        "| teacher | MB | of the first | KL(first, this) | reverse KL "
        "| change |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["bytes"] / rows[0]["bytes"]
        lines.append(
            f"| {row['teacher']} | {row['bytes'] / 1e6:.2f} | {share:.0%} "
            f"| {row['kl']:.2e} | {row['reverse_kl']:.4f} "
            f"| {row['change']:+.4f} ({row['relative_change']:+.2%}) |"
        )
    return "\n".join(lines)


def _written(
    settings: Settings, pair: Pair, student: Any, count: int
) -> Iterator[Trajectories]:
    """What the student writes on the first held-out prompts."""
    options = settings.rollout
    write: Callable[..., Trajectories] = jax.jit(
        lambda student, prompts, key: rollout(
            cast(student, student.config.dtype), prompts, key,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, top_p=options.top_p,
            top_k=options.top_k, eos_ids=pair.tokenizer.eos_ids,
            pad_id=pair.tokenizer.pad_id,
            vocab_size=shared_rows(student, pair.teacher),
        )
    )  # fmt: skip
    size = settings.eval.batch_size
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAM)
    for i, batch in enumerate(ordered_batches(pair.test, batch_size=size)):
        if i * size >= count:
            break
        written = write(
            student, pair.spread(batch.prompts), jax.random.fold_in(key, i)
        )
        real = (batch.index >= 0) & (batch.index < count)
        yield written.replace(mask=written.mask & real[:, None])


def _distance(
    loaded: Decoder, smaller: Decoder, trajectories: Trajectories
) -> tuple[jax.Array, jax.Array]:
    """(sum, count) over tokens of KL(loaded || smaller), nats."""
    ours, theirs = (
        completion_states(
            model(
                trajectories.sequence,
                trajectories.positions,
                causal_spans(trajectories.sequence_mask),
            )[0],
            trajectories.prompt.shape[1],
        )
        for model in (loaded, smaller)
    )
    # reverse_kl(student, teacher) is KL(student || teacher).
    kl = fused.fused_divergence(ours, loaded.head, theirs, smaller.head)
    mask = trajectories.mask
    return (mask * kl).sum(), mask.sum().astype(kl.dtype)


def _buffer_bytes(model: Decoder) -> int:
    leaves = jax.tree.leaves(model.arrays)
    return sum(
        shard.data.on_device_size_in_bytes()
        for x in leaves
        for shard in x.addressable_shards
    )
