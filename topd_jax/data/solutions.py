"""Solutions that a teacher wrote, on disk, in shards.

``topd generate`` writes a directory. ``set.json`` describes it, and each shard
appears in one rename: a job that was killed resumes with the missing shards.
A shard has one JSON object a line.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from topd_jax.parallel import buckets
from topd_jax.settings import parse_json

# The way out of a set that is damaged.
_AGAIN = "remove the file and rerun topd generate"


class Solution(TypedDict):
    """One completion of one prompt.

    Keys:
      index: place of its prompt among the training prompts, from 0.
      sample: which of the prompt's solutions, from 0.
      prompt: the question's text, before any chat template.
      answer: the reference answer; "" if there is none.
      completion: its text.
      prompt_tokens: i32[P] the chat template applied.
      completion_tokens: i32[T] up to and including the end of sequence.
      truncated: whether it reached the limit without an end.
      logp_mean: mean log-probability of its tokens under the sampler's
        distribution (temperature and top-p applied), nats.
      correct: whether it gives the answer; None where it is not known.
    """

    index: int
    sample: int
    prompt: str
    answer: str
    completion: str
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    truncated: bool
    logp_mean: float
    correct: bool | None


@dataclasses.dataclass(frozen=True)
class SolutionFiles:
    """The files of a set.

    Attributes:
      folder: the directory.
      shards: how many there are.
    """

    folder: pathlib.Path
    shards: int

    def path(self, shard: int) -> pathlib.Path:
        """Return the path of a shard."""
        name = f"solutions-train-{shard:05d}-of-{self.shards:05d}.jsonl"
        return self.folder / name

    def missing(self) -> list[int]:
        """Return the shards that are still to be written."""
        return [i for i in range(self.shards) if not self.path(i).exists()]

    def write(self, shard: int, solutions: Sequence[Solution]) -> None:
        """Write a shard; it exists whole or not at all."""
        lines = (
            json.dumps(s, default=np.ndarray.tolist) + "\n" for s in solutions
        )
        buckets.write_whole(self.path(shard), "".join(lines))

    def read(self, shard: int) -> Iterator[Solution]:
        """Yield the solutions of a shard, in order."""
        path = self.path(shard)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                row = parse_json(line, f"{path} line {number}", _AGAIN)
                for name in ("prompt_tokens", "completion_tokens"):
                    row[name] = np.asarray(row[name], np.int32)
                yield row


def open_set(folder: pathlib.Path, about: Mapping[str, Any]) -> SolutionFiles:
    """Start a set, or resume the one in the directory.

    Args:
      folder: of the set; created where it is missing.
      about: JSON-able; what the set is made of, and "shards".

    Returns:
      Its files.

    Raises:
      ValueError: where the directory has another set, naming the differences.
    """
    path = folder / "set.json"
    if path.exists():
        there = _read_about(folder)
        differing = [
            f"{name}: {there.get(name)!r} there, {about.get(name)!r} here"
            for name in sorted(there.keys() | about.keys())
            if there.get(name) != about.get(name)
        ]
        if differing:
            raise ValueError(
                f"{folder} has solutions of other settings "
                f"({'; '.join(differing)}); use another --workdir, or the "
                "settings of that set"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        buckets.write_whole(path, json.dumps(about, indent=1))
    return SolutionFiles(folder, about["shards"])


def find_set(path: str) -> tuple[SolutionFiles, dict[str, Any]]:
    """Find a complete set.

    Args:
      path: its directory, or the work directory of ``topd generate``.

    Returns:
      (its files, the contents of ``set.json``).

    Raises:
      ValueError: where there is none, or shards are missing.
    """
    folder = buckets.as_path(path)
    if not (folder / "set.json").exists():
        folder = folder / "solutions"
    if not (folder / "set.json").exists():
        raise ValueError(
            f"offline.path={path} has no solutions (no set.json); give it "
            "the directory of topd generate"
        )
    about = _read_about(folder)
    files = SolutionFiles(folder, about["shards"])
    missing = files.missing()
    if missing:
        raise ValueError(
            f"offline.path={path} has {files.shards - len(missing)} of "
            f"{files.shards} shards; rerun topd generate to write the others"
        )
    return files, about


def read_solutions(
    path: str, keep: str = "all", *, tokenizer: str | None = None
) -> list[Solution]:
    """Read a complete set.

    Args:
      path: as :func:`find_set` takes it.
      keep: "all"; "complete", those that end; or "correct", those that give
        the right answer.
      tokenizer: its expected fingerprint; None skips this check.

    Returns:
      The solutions to keep, in order.

    Raises:
      ValueError: where the set is not complete or damaged, has another
        tokenizer's ids, "correct" is not known of some solution, or none is
        left.
    """
    files, about = find_set(path)
    if tokenizer not in (None, about.get("tokenizer")):
        raise ValueError(
            f"offline.path={path} was written with another tokenizer "
            f"(fingerprint {about.get('tokenizer')} there, {tokenizer} here); "
            "generate with this run's teacher"
        )
    solutions = [s for i in range(files.shards) for s in files.read(i)]
    if keep == "correct":
        unknown = sum(s["correct"] is None for s in solutions)
        if unknown:
            raise ValueError(
                f'offline.keep="correct", but {unknown} of {len(solutions)} '
                f"solutions in {files.folder} have no reference answer; "
                'choose "all" or "complete"'
            )
        kept = [s for s in solutions if s["correct"]]
    elif keep == "complete":
        kept = [s for s in solutions if not s["truncated"]]
    else:
        kept = solutions
    if not kept:
        raise ValueError(
            f"offline.keep={keep!r} leaves none of the {len(solutions)} "
            f'solutions in {files.folder}; choose "all"'
        )
    return kept


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "set.json"
    return parse_json(path.read_bytes(), str(path), _AGAIN)
