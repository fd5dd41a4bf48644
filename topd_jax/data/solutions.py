"""Solutions that a teacher wrote, on disk, in shards.

``topd generate`` writes a directory. ``set.json`` describes it, and each shard
appears in one rename: a job that was killed resumes with the missing shards.
Format "array_record" is a TFDS dataset (``tfds.builder_from_directory``, or
any reader of ArrayRecord), "jsonl" has one JSON object a line.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

# ``correct`` of an ungraded completion, in formats without None.
_UNGRADED = -1


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
      format: "array_record" or "jsonl".
      shards: how many there are.
    """

    folder: pathlib.Path
    format: str
    shards: int

    def path(self, shard: int) -> pathlib.Path:
        """Return the path of a shard, named as TFDS names ArrayRecord files."""
        part = f"{shard:05d}-of-{self.shards:05d}"
        if self.format == "jsonl":
            return self.folder / f"solutions-train-{part}.jsonl"
        return self.folder / f"solutions-train.array_record-{part}"

    def missing(self) -> list[int]:
        """Return the shards that are still to be written."""
        return [i for i in range(self.shards) if not self.path(i).exists()]

    def write(self, shard: int, solutions: Sequence[Solution]) -> None:
        """Write a shard; it exists whole or not at all."""
        partial = self.folder / f"{self.path(shard).name}.part"
        if self.format == "jsonl":
            lines = (json.dumps(_plain(s)) + "\n" for s in solutions)
            partial.write_text("".join(lines), encoding="utf-8")
        else:
            _write_array_record(partial, solutions)
        _into_place(partial, self.path(shard))

    def read(self, shard: int) -> Iterator[Solution]:
        """Yield the solutions of a shard, in order."""
        if self.format == "jsonl":
            with self.path(shard).open(encoding="utf-8") as lines:
                for line in lines:
                    yield _solution(json.loads(line))
            return
        # Imported here because it takes seconds.
        from array_record.python.array_record_module import ArrayRecordReader

        decode = _features().deserialize_example_np
        reader = ArrayRecordReader(str(self.path(shard)))
        for record in reader.read_all():
            yield _solution(decode(record))
        reader.close()

    def finish(self, lengths: Sequence[int]) -> None:
        """Write the metadata of TFDS, once all shards exist.

        Args:
          lengths: solutions of each shard.
        """
        if self.format == "jsonl":
            return
        import tensorflow_datasets as tfds

        sizes = [self.path(i).stat().st_size for i in range(self.shards)]
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.folder,
            dataset_name="solutions",
            split="train",
            filetype_suffix="array_record",
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.folder,
            features=_features(),
            split_infos=[
                tfds.core.SplitInfo(
                    name="train",
                    shard_lengths=list(lengths),
                    num_bytes=sum(sizes),
                    filename_template=template,
                )
            ],
            description="Solutions that a teacher wrote; see set.json.",
            check_data=False,  # the check needs TensorFlow
        )


def open_set(folder: pathlib.Path, about: Mapping[str, Any]) -> SolutionFiles:
    """Start a set, or resume the one in the directory.

    Args:
      folder: of the set; created where it is missing.
      about: JSON-able; what the set is made of, and "format" and "shards".

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
        partial = folder / "set.json.part"
        partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
        _into_place(partial, path)
    return SolutionFiles(folder, about["format"], about["shards"])


def find_set(path: str) -> tuple[SolutionFiles, dict[str, Any]]:
    """Find a complete set.

    Args:
      path: its directory, or the work directory of ``topd generate``.

    Returns:
      (its files, the contents of ``set.json``).

    Raises:
      ValueError: where there is none, or shards are missing.
    """
    folder = pathlib.Path(path)
    if not (folder / "set.json").exists():
        folder = folder / "solutions"
    if not (folder / "set.json").exists():
        raise ValueError(
            f"offline.path={path} has no solutions (no set.json); give it "
            "the directory of topd generate"
        )
    about = _read_about(folder)
    files = SolutionFiles(folder, about["format"], about["shards"])
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
      ValueError: where the set is not complete, has another tokenizer's ids,
        "correct" is not known of some solution, or none is left.
    """
    files, about = find_set(path)
    if tokenizer not in (None, about["tokenizer"]):
        raise ValueError(
            f"offline.path={path} was written with another tokenizer "
            f"(fingerprint {about['tokenizer']} there, {tokenizer} here); "
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
    return json.loads((folder / "set.json").read_text(encoding="utf-8"))


def _into_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    # Synced before it is renamed: a power cut leaves no torn shard.
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _plain(solution: Solution) -> dict[str, Any]:
    return {
        k: v.tolist() if isinstance(v, np.ndarray) else v
        for k, v in solution.items()
    }


def _solution(row: Mapping[str, Any]) -> Solution:
    def text(name: str) -> str:
        value = row[name]
        return value.decode("utf-8") if isinstance(value, bytes) else value

    correct = row["correct"]
    if correct is not None:
        correct = None if correct == _UNGRADED else bool(correct)
    return Solution(
        index=int(row["index"]),
        sample=int(row["sample"]),
        prompt=text("prompt"),
        answer=text("answer"),
        completion=text("completion"),
        prompt_tokens=np.asarray(row["prompt_tokens"], np.int32),
        completion_tokens=np.asarray(row["completion_tokens"], np.int32),
        truncated=bool(row["truncated"]),
        logp_mean=float(row["logp_mean"]),
        correct=correct,
    )


def _features() -> Any:
    """Return the features of a set, as TFDS writes and reads them."""
    import tensorflow_datasets as tfds

    features = tfds.features
    ids = features.Tensor(shape=(None,), dtype=np.int32)
    return features.FeaturesDict(
        {
            "index": features.Scalar(np.int64),
            "sample": features.Scalar(np.int64),
            "prompt": features.Text(),
            "answer": features.Text(),
            "completion": features.Text(),
            "prompt_tokens": ids,
            "completion_tokens": ids,
            "truncated": features.Scalar(np.bool_),
            "logp_mean": features.Scalar(np.float32),
            # 1, 0, or -1 where it is not known.
            "correct": features.Scalar(np.int64),
        }
    )


def _write_array_record(
    path: pathlib.Path, solutions: Sequence[Solution]
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features()
    serializer = ExampleSerializer(features.get_serialized_info())
    # One record a group, for random access.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for solution in solutions:
        row = dict(solution)
        if row["correct"] is None:
            row["correct"] = _UNGRADED
        example = serializer.get_tf_example(features.encode_example(row))
        # The order of a proto's map differs between processes.
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()
