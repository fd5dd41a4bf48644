"""Where prompts come from."""

import json
import pathlib
import sys
import types

import pytest

from topd_jax.data.settings import DataSettings, WorldSettings
from topd_jax.data.sources import Fields, read_records, read_source
from topd_jax.data.toy_world import problems


def write_lines(path: pathlib.Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_jsonl_keeps_questions_and_answers(tmp_path):
    path = write_lines(
        tmp_path / "q.jsonl",
        '{"question": "How many?", "answer": "#### 2", "more": 1}',
        "",
        '{"question": "Où?", "answer": 7}',
        '{"question": "Who?"}',
    )
    records = read_source("jsonl", path)
    assert [r["prompt"] for r in records] == ["How many?", "Où?", "Who?"]
    assert [r["answer"] for r in records] == ["#### 2", "7", ""]
    assert [r["index"] for r in records] == [0, 1, 2]
    assert records[1]["source"].endswith("q.jsonl line 3")
    other = write_lines(
        tmp_path / "p.jsonl", '{"problem": "a", "key": "b", "by": "math"}'
    )
    fields = Fields(("text", "problem"), "key", "by", ("code", "math"))
    (record,) = read_source("jsonl", other, fields=fields)
    assert list(record.values())[:2] == ["a", "b"]
    assert record["teacher"] == "math"


def test_prompts_of_a_run(tmp_path):
    path = write_lines(
        tmp_path / "q.jsonl",
        *(json.dumps({"question": f"{i}+1?"}) for i in range(5)),
    )

    def read(**data):
        parts = read_records(
            DataSettings(**data), WorldSettings(prompts=9), problems=4,
            final_problems=3,
        )  # fmt: skip
        assert all(
            record["answer"] == problems.answer(record["prompt"])
            for record in parts[0]
            if record["answer"]
        )
        return [[r["prompt"] for r in part] for part in parts]

    assert read() == [
        list(problems.problems("train", 9, 0)),
        list(problems.problems("validation", 4, 0)),
        list(problems.problems("test", 3, 0)),
    ]
    file = {"source": "jsonl", "path": path}
    first, rest = ["0+1?", "1+1?"], ["2+1?", "3+1?", "4+1?"]
    assert read(**file, held_out=2) == [rest, first, first]
    # A question that is asked again is not trained on.
    again = write_lines(
        tmp_path / "again.jsonl",
        *(json.dumps({"question": f"{i % 3}+1?"}) for i in range(7)),
    )
    file |= {"path": again}
    assert read(**file, held_out=2) == [["2+1?", "2+1?"], first, first]
    with pytest.raises(ValueError, match="by the first data.held_out=3"):
        read(**file, held_out=3)
    file |= {"path": path}
    apart = write_lines(
        tmp_path / "apart.jsonl",
        *(json.dumps({"question": f"{i}+1?"}) for i in (4, 5)),
    )
    held_out = ["4+1?", "5+1?"]
    found = read(**file, eval_path=apart)
    assert found == [first + rest[:2], held_out, held_out]
    with pytest.raises(ValueError, match="held out by data.eval_path="):
        read(**file, eval_path=path)
    with pytest.raises(ValueError, match="held_out=5 must be below the 5 "):
        read(**file, held_out=5)
    with pytest.raises(ValueError, match="data.path is empty"):
        read(source="tfds")
    for name in ("path", "eval_path"):
        with pytest.raises(ValueError, match="'world' does not read .*q.jsonl"):
            read(**{name: path})


def test_hub_needs_its_package_and_reads_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_source("hub", "owner/questions")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        if split != "test":
            raise (OSError if split == "train" else RuntimeError)("no network")
        return [{"question": "a", "answer": "b"}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    (record,) = read_source("hub", "owner/questions:main", "test")
    assert asked == [("owner/questions", "main", "test")]
    assert (record["prompt"], record["answer"]) == ("a", "b")
    with pytest.raises(ValueError, match="cannot read hub .*: no network"):
        read_source("hub", "owner/questions")
    with pytest.raises(ValueError, match="cannot read hub .*: no network"):
        read_source("hub", "owner/script", "dev")


def test_tfds_reads_array_record(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class ToyQuestions(tfds.core.GeneratorBasedBuilder):
        """Two questions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict(
                {"question": text, "answer": text}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(2):
                yield i, {"question": f"Où {i}?", "answer": str(i)}

    builder = ToyQuestions(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "builder", lambda name: builder)
        named = read_source("tfds", "toy_questions")
        # As TensorFlow's users have it, prepared as TFRecord.
        patch.setattr(builder.info, "available_file_formats", lambda: {"tf"})
        with pytest.raises(ValueError, match="anew with file_format="):
            read_source("tfds", "toy_questions")
    assert {(r["prompt"], r["answer"]) for r in named} == {
        ("Où 0?", "0"),
        ("Où 1?", "1"),
    }
    directory = str(builder.data_dir)
    for a, b in zip(read_source("tfds", directory), named, strict=True):
        assert a["prompt"] == b["prompt"]
    with pytest.raises(ValueError, match=r"cannot read .*'no_such_name'"):
        read_source("tfds", "no_such_name")
    with pytest.raises(ValueError, match=r"split 'dev'"):
        read_source("tfds", directory, "dev")
