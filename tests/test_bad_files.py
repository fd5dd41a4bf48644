"""Files that are damaged or hostile: prompts, solutions, models, tokenizers."""

import functools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as fuzzing
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from small_files import LLAMA, make
from small_hub import hub_directory
from small_run import Refusal, attempt, refusal_of

from topd_jax.data.prompts import encode_prompts
from topd_jax.data.solutions import read_solutions
from topd_jax.data.sources import Fields, read_source
from topd_jax.data.tokenizers import wrap_tokenizer
from topd_jax.models import load, save_model
from topd_jax.models.io.loading import describe

DEEP = b"[" * 100_000
ROW = '{"question": "Où?", "answer": "b"}\n'
FUZZING = dict(deadline=None, derandomize=True, database=None)

# Prompts.

READ = [
    (b"\xef\xbb\xbf" + ROW.encode(), "b"),
    (ROW.replace("\n", "\r\n").encode() * 2, "b"),
    (b"\n  \n" + ROW.encode() + b"\r\n\n", "b"),
    (b'{"question": "a", "answer": null}', ""),
    (b'{"question": "a", "answer": NaN}', ""),
]


@pytest.mark.parametrize(("data", "answer"), READ)
def test_prompts_of_any_spelling_are_read(data, answer, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(data)
    records = read_source("jsonl", str(tmp_path / "q.jsonl"))
    assert {r["answer"] for r in records} == {answer}


REFUSED = [
    (b"\n \n", "holds no records"),
    (ROW.encode("utf-16"), "is not UTF-8 .*0xff.* convert it to UTF-8$"),
    (ROW.replace("ù", "u").encode("utf-16-le"), "zero bytes; is it UTF-16"),
    (ROW.encode("latin-1"), "is not UTF-8 .*0xf9.* convert it to UTF-8$"),
    (ROW.replace("\n", "\r").encode() * 2, r"line 1 is not JSON \(Extra"),
    (DEEP, r"is not JSON \(maximum recursion .*; repair or remove it$"),
    (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "4300 digits"),
    (b"[1]", 'line 1 is JSON but not an object: .* field "question"'),
    (b'{"problem": "a"}', r"fields are \['problem'\]; set data.prompt_field"),
    (b'{"question": ["a"]}', 'has no text in the field "question"'),
    (b'{"question": " \\n"}', "has no text"),
    (b'{"question": "a\\ud800"}', "is not Unicode text"),
    (b'{"question": "a", "answer": "\\udfff"}', "is not Unicode text"),
    (b'{"question": "a", "answer": ["1"]}', r"answer \['1'\] .*; it must be"),
    (b'{"question": "a", "by": null}', '"by" .* is None; .* of .*: code, math'),
    (b'{"question": "a", "by": "mat"}', "the nearest is 'math'"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_prompts_that_cannot_be_read_are_refused(data, message, tmp_path):
    """By place, also after a line that can."""
    path = tmp_path / "q.jsonl"
    by = b'"by"' in data
    fields = Fields(teacher="by" * by, teachers=("code", "math"))

    def refused(data: bytes) -> str:
        path.write_bytes(data)
        read = functools.partial(read_source, "jsonl", str(path))
        return refusal_of(functools.partial(read, fields=fields))

    line = refused(data)
    assert str(path) in line and re.search(message, line), line
    if "line 1" in line:
        line = refused(b'{"question": "a", "by": "code"}\n' + data)
        assert f"{path} line 2" in line


@fuzzing(max_examples=100, **FUZZING)
@given(st.binary(max_size=40) | st.from_regex(r'\{"question": ?"?.{0,9}"?\}'))
def test_any_bytes_are_records_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    records = attempt(lambda: read_source("jsonl", str(path)))
    assert isinstance(records, Refusal) or all(r["prompt"] for r in records)


def test_paths_that_hold_no_file_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "loop", tmp_path / "absent", "\0"):
        line = refusal_of(lambda path=path: read_source("jsonl", str(path)))
        assert "no file at" in line and "give data.path" in line
    assert "too long" in refusal_of(lambda: read_source("jsonl", "a" * 5000))


# Solutions.

SOLUTION = {
    "index": 0, "sample": 0, "prompt": "a", "answer": "b", "completion": "c",
    "prompt_tokens": [1], "completion_tokens": [2, 3], "truncated": False,
    "logp_mean": -1.0, "correct": None,
}  # fmt: skip
LINE = json.dumps(SOLUTION).encode() + b"\n"
ABOUT = b'{"shards": 1, "tokenizer": "t"}'
BAD_SETS = [
    (b"x", LINE, "set.json is not JSON .*remove the file and rerun"),
    (b'{"shards": 2}', LINE, "has 1 of 2 shards; rerun topd generate"),
    (b'{"shards": 1}', LINE, "written with another tokenizer"),
    (ABOUT, b"", "leaves none of the 0 solutions"),
    (ABOUT, LINE + LINE[:-30], "line 2 is not JSON .*; remove the file and re"),
]  # fmt: skip


@pytest.mark.parametrize(("about", "shard", "message"), BAD_SETS)
def test_a_damaged_set_of_solutions_is_refused(about, shard, message, tmp_path):
    (tmp_path / "set.json").write_bytes(about)
    (tmp_path / "solutions-train-00000-of-00001.jsonl").write_bytes(shard)
    (tmp_path / "solutions-train-00000-of-00002.jsonl").write_bytes(shard)
    path = str(tmp_path)
    line = refusal_of(lambda: read_solutions(path, tokenizer="t"))
    assert path in line and re.search(message, line), line


# Models.

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-0000{}-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One file, several files, and one with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_model(make(LLAMA), folder / "one")
    save_model(make(LLAMA), folder / "shards", max_shard_bytes=60_000)
    hub_directory(folder / "chat")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """(name) -> a copy of a directory, to be damaged."""

    def copy(name: str) -> Path:
        return shutil.copytree(whole / name, tmp_path / name)

    return copy


SIZES = (0, 1.5, True, float("nan"))
FIELDS = [
    ("num_hidden_layers", (*SIZES, None, 1001)),
    ("vocab_size", (*SIZES, None, 2**31)),
    ("hidden_size", SIZES),
    ("intermediate_size", SIZES),
    ("num_attention_heads", (*SIZES, 3)),
    ("num_key_value_heads", (0, 3)),
    ("head_dim", (0, 7)),
    ("rms_norm_eps", (0, "x", float("nan"), float("inf"))),
    ("tie_word_embeddings", (1, "x")),
    ("attention_bias", (1,)),
    ("hidden_act", (3, "relu", None)),
    ("model_type", (None, "nope", "bert", [])),
    ("quantization_config", ({"bits": 4},)),
    ("rope_parameters",
     ([], {"rope_type": []}, {"rope_type": "x"}, {"rope_theta": -1},
      {"rope_theta": 1e4, "rope_type": "linear", "factor": 0},
      {"rope_theta": 1e4, "rope_type": "linear"})),
    ("new_field", (1,)),
    ("eos_token_id", (-1, 1.5, [[1]], 2**31)),
]  # fmt: skip
FIELD_CASES = [(name, value) for name, values in FIELDS for value in values]


@pytest.mark.parametrize(("name", "value"), FIELD_CASES)
def test_a_field_of_a_config_that_means_nothing(name, value, copied):
    path = copied("one") / "config.json"
    fields = json.loads(path.read_text())
    (path.parent / "generation_config.json").unlink()
    path.write_text(json.dumps(fields | {name: value}))
    line = refusal_of(lambda: describe(path.parent))
    assert str(path) in line
    assert name in line or "cannot be read" in line


@pytest.mark.parametrize("name", [CONFIG, GENERATION, INDEX])
@pytest.mark.parametrize(
    ("data", "message"), [(b"", "is not JSON ("), (b"[]", "a JSON object")]
)
def test_a_file_of_a_model_that_is_no_object(name, data, message, copied):
    folder = copied("shards")
    (folder / name).write_bytes(data)
    line = refusal_of(lambda: load(folder))
    assert str(folder / name) in line and message in line


@pytest.mark.parametrize(
    "change",
    [lambda x: x.astype(np.int64), lambda x: x.astype(bool), lambda x: x[:9]],
)
def test_a_tensor_of_another_kind_or_shape_is_refused(change, copied):
    folder, name = copied("one"), "model.norm.weight"
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS)
    line = refusal_of(lambda: load(folder))
    assert str(folder) in line and name in line


@pytest.mark.parametrize("size", [0, 9, 5000, -1])
def test_weights_that_are_cut_short(size, copied):
    folder = copied("one")
    data = (folder / WEIGHTS).read_bytes()
    for part in (data[:size], b"\xff" * max(size, 9), data + b"x"):
        (folder / WEIGHTS).write_bytes(part)
        line = refusal_of(lambda: load(folder))
        assert f"{folder / WEIGHTS} cannot be read" in line
        assert line.endswith("was its download cut short?")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"weight_map": []}', 'has no "weight_map"'),
     ('{"weight_map": {}}', 'has no "weight_map"'),
     ('{"weight_map": {"a": 1, "b": "x"}}', "the name of a file"),
     *((f'{{"weight_map": {{"a": {json.dumps(name)}}}}}', "")
       for name in ("absent", "", "..", "/etc/passwd", "\0", "a" * 5000))],
)  # fmt: skip
def test_an_index_that_names_no_shards(text, message, copied):
    folder = copied("shards")
    (folder / INDEX).write_text(text)
    assert message in refusal_of(lambda: load(folder))


def test_files_that_are_missing_or_are_no_files(copied, tmp_path):
    def refused(name: str, change) -> str:
        folder = copied(name)
        change(folder)
        line = refusal_of(lambda: load(folder))
        shutil.rmtree(folder)
        return line

    def loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path)

    def folder_instead(path: Path) -> None:
        path.unlink()
        path.mkdir()

    first, second = SHARD.format(1), SHARD.format(2)
    for suffix in ("pytorch_model.bin", "training_args.bin"):
        line = refused("one", lambda f, s=suffix: (f / WEIGHTS).rename(f / s))
        assert f"convert {suffix} to safetensors" in line

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    for name in (CONFIG, WEIGHTS):
        line = refused("one", lambda f, n=name: (f / n).unlink())
        assert f"no file {tmp_path / 'one' / name}" in line or INDEX in line
    for base, name in (
        ("one", CONFIG), ("one", GENERATION), ("one", WEIGHTS),
        ("shards", INDEX), ("shards", SHARD.format(2)),
        ("chat", "tokenizer.json"), ("chat", "chat_template.jinja"),
    ):  # fmt: skip
        for change in (loop, folder_instead, pipe):
            line = refused(base, lambda f, n=name, c=change: c(f / n))
            assert name in line and ("is no file" in line or "lacks 1" in line)
    line = refused("shards", lambda f: (f / second).unlink())
    assert f"lacks 1 of its 3 shards: {second}; download" in line
    line = refused("shards", lambda f: (f / second).write_bytes(b"\x80\x04."))
    assert f"{second} cannot be read" in line
    line = refused("shards", lambda f: shutil.copy(f / first, f / second))
    assert "names" in line and "that no shard holds: model." in line


def test_a_tensor_in_two_shards_must_be_the_same(copied):
    folder = copied("shards")
    first, second = folder / SHARD.format(1), folder / SHARD.format(2)
    name, value = next(iter(load_file(first).items()))
    tensors = load_file(second)
    save_file(tensors | {name: value}, second)
    load(folder)
    save_file(tensors | {name: value + 1}, second)
    line = refusal_of(lambda: load(folder))
    assert f"hold {name}, each with other values" in line


def test_a_config_of_deeply_nested_objects(copied):
    path = copied("one") / CONFIG
    deep = '{"a": ' * 900 + "1" + "}" * 900
    path.write_text(f'{path.read_text().rstrip()[:-1]}, "id2label": {deep}}}')
    line = refusal_of(lambda: describe(path.parent))
    assert f"{path} nests deeper than 50 objects" in line


# Tokenizers.


@pytest.mark.parametrize(
    ("name", "data"),
    [("tokenizer.json", b"x"), ("tokenizer.json", b"{}"),
     ("tokenizer_config.json", b"\xff"), ("tokenizer_config.json", DEEP),
     ("tokenizer_config.json", b'{"eos_token": 3}'),
     ("chat_template.jinja", b"{{")],
)  # fmt: skip
def test_a_tokenizer_that_is_damaged(name, data, copied):
    folder = copied("chat")
    (folder / name).write_bytes(data)
    line = refusal_of(lambda: wrap_tokenizer(load(folder)[1]).chat("hi"))
    assert "tokenizer" in line


def test_a_special_token_beyond_the_rows_is_left_out(copied):
    """As Gemma 3's of one size has one for images; no text is read as it."""
    folder = copied("chat")
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    whole = wrap_tokenizer(load(folder)[1])
    image = fields["added_tokens"][0] | {"id": 259, "content": "<image>"}
    fields["added_tokens"].append(image)
    path.write_text(json.dumps(fields))
    tokenizer = wrap_tokenizer(load(folder)[1])
    assert tokenizer.vocabulary() == whole.vocabulary()
    assert tokenizer.chat("<image>") == whole.chat("<image>")
    assert max(tokenizer.encode("an <image>")) < 259
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"eos_token": "<image>"}
    settings.write_text(json.dumps(named))
    assert "ids up to 259" in refusal_of(lambda: load(folder))
    # Ids may have gaps: fewer of them than rows proves nothing.
    fields["model"]["vocab"]["a"] = 500
    path.write_text(json.dumps(fields))
    line = refusal_of(lambda: load(folder))
    assert "ids up to 500 and the model 259 rows" in line


def test_code_beside_a_tokenizer_is_not_run(copied, tmp_path):
    folder, ran = copied("chat"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: 0")
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    for kind in ("Evil", fields["tokenizer_class"]):
        path.write_text(json.dumps(fields | {
            "tokenizer_class": kind,
            "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        }))  # fmt: skip
        attempt(lambda: load(folder))
    assert not ran.exists()


def test_a_prompt_without_a_token_is_refused(copied):
    folder = copied("chat")
    (folder / "chat_template.jinja").write_text("")
    wrapped = wrap_tokenizer(load(folder)[1])
    records = [{"prompt": "a", "answer": "", "index": 0, "source": "q line 1"}]
    line = refusal_of(lambda: encode_prompts(records, wrapped, max_length=9))
    assert "prompt 0 (q line 1) has no tokens" in line
