"""Where prompts come from."""

import pathlib
import sys
import types

import pytest

from topd_jax.data import sources
from topd_jax.data.toy_world import problems


def write_lines(path: pathlib.Path, *lines: str) -> pathlib.Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_jsonl_keeps_questions_and_answers(tmp_path):
    path = write_lines(
        tmp_path / "q.jsonl",
        '{"question": "How many?", "answer": "#### 2", "more": 1}',
        "",
        '{"question": "Où?", "answer": 7}',
        '{"question": "Who?"}',
    )
    records = sources.read_jsonl(path)
    assert [r["prompt"] for r in records] == ["How many?", "Où?", "Who?"]
    assert [r["answer"] for r in records] == ["#### 2", "7", ""]
    assert [r["index"] for r in records] == [0, 1, 2]
    assert records[1]["source"].endswith("q.jsonl line 3")
    other = write_lines(tmp_path / "p.jsonl", '{"problem": "a", "key": "b"}')
    (record,) = sources.read_jsonl(
        other, prompt_field="problem", answer_field="key"
    )
    assert (record["prompt"], record["answer"]) == ("a", "b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"', r"q.jsonl line 2 is not JSON"),
        ("[1, 2]", r"q.jsonl line 2 is JSON but not an object"),
        ('{"problem": "a"}', r'line 2 has no text .*"question".*problem'),
        ('{"question": 3}', r"line 2 has no text"),
        ('{"question": ""}', r"line 2 has no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, message: str):
    path = write_lines(tmp_path / "q.jsonl", '{"question": "a"}', line)
    with pytest.raises(ValueError, match=message):
        sources.read_jsonl(path)


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        sources.read_jsonl(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file at .*absent.*data.path"):
        sources.read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="no file at"):
        sources.read_jsonl(tmp_path)
    empty = write_lines(tmp_path / "empty.jsonl", "")
    with pytest.raises(ValueError, match="holds no records"):
        sources.read_jsonl(empty)


def test_world_records_carry_their_answers():
    records = sources.read_world("test", 20, seed=0)
    assert [r["prompt"] for r in records] == problems.problems("test", 20, 0)
    for record in records:
        assert problems.answer(record["prompt"]) == record["answer"]


def test_hub_needs_its_package_and_reads_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        sources.read_hub("owner/questions")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [{"question": "a", "answer": "b"}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    (record,) = sources.read_hub("owner/questions:main", split="test")
    assert asked == [("owner/questions", "main", "test")]
    assert (record["prompt"], record["answer"]) == ("a", "b")


def test_tfds_reads_array_record(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class ToyQuestions(tfds.core.GeneratorBasedBuilder):
        """Two questions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"question": text, "answer": text}
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(2):
                yield i, {"question": f"Où {i}?", "answer": str(i)}

    builder = ToyQuestions(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    records = sources.read_tfds("toy_questions", data_dir=str(tmp_path))
    assert {(r["prompt"], r["answer"]) for r in records} == {
        ("Où 0?", "0"),
        ("Où 1?", "1"),
    }
    with pytest.raises(ValueError, match=r"cannot read .*'no_such_name'"):
        sources.read_tfds("no_such_name", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"split 'dev'"):
        sources.read_tfds("toy_questions", split="dev", data_dir=str(tmp_path))
