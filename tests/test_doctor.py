"""The preflight: what fits, and every kind of misfit with its way out."""

import json

import pytest
import small_hub
from small_files import edit_config
from small_hub import END, STOP, copier, hub_directory

from topd_jax.cli import main
from topd_jax.cli.doctor import examine, findings, tokens
from topd_jax.cli.doctor.files import Context, ModelFiles
from topd_jax.cli.train import train


def named(found, name):
    """The findings of a name: (level, text, way out)."""
    return [(f.level, f.text, f.way_out) for f in found if f.name == name]


def levels(found):
    return {f.name: f.level for f in found if f.level != "ok"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return hub_directory(tmp_path_factory.mktemp("t") / "teacher", ends=[1])


def looked(tmp_path, teacher, changes=(), **options):
    """What the first stage says of a doctored student."""
    student = hub_directory(tmp_path / "student", **options)
    settings = small_hub.settings(tmp_path, student, teacher, **dict(changes))
    return examine.examine_files(settings, tmp_path / "none")


def test_nothing_is_found_in_a_pair_that_fits(tmp_path, teacher):
    found = looked(tmp_path, teacher, ends=[1], model=copier(4.0))
    assert levels(found) == {}
    names = {f.name for f in found}
    assert names >= {
        "tokenizers", "encoding", "chat template", "prompts", "vocabulary",
        "ends", "dtype", "mesh", "memory",
    }  # fmt: skip
    assert not any(f.way_out for f in found)


# Tokenizers, templates, ends.


def test_one_id_that_means_another_piece(tmp_path, teacher):
    found = looked(tmp_path, teacher, swapped=("a", "z"))
    ((level, text, way_out),) = named(found, "tokenizers")
    assert level == "error"
    vocabulary = small_hub.small_tokenizer().get_vocab()
    a, z = vocabulary["a"], vocabulary["z"]
    assert "different vocabularies (259 and 259 ids): 2 ids differ" in text
    assert f"(id: student / teacher) {a}: 'z' / 'a', {z}: 'a' / 'z'" in text
    assert "choose a pair that shares one tokenizer" in way_out
    assert named(found, "mesh")  # the rest was looked at all the same


class Words:
    """A tokenizer of given pieces, one a word."""

    vocab_size = 6

    def __init__(self, begin=0):
        self._begin = begin

    def vocabulary(self):
        return [*"abcdef"]

    def encode(self, text):
        return [len(w) + self._begin for w in text.split()]

    def chat(self, text):
        return [5]


@pytest.mark.parametrize(
    ("begin", "level", "text"),
    [
        (0, "ok", "the same on 1 records"),
        (2, "warning", "differs from token 0 on: student 1 'b', 2 'c' / "
         "teacher 3 'd', 4 'e'"),
    ],
)  # fmt: skip
def test_the_same_pieces_may_be_cut_in_another_way(begin, level, text):
    models = {
        "student": ModelFiles(None, Words()),
        "teacher": ModelFiles(None, Words(begin)),
    }
    records = [{"prompt": "p", "answer": "a bc"}]
    found = [*tokens.templates(Context(None, models, records, None))]
    assert [f.level for f in found if f.name == "chat template"] == ["ok"]
    ((got, said, _),) = named(found, "encoding")
    assert (got, said) == (level, text)


def test_where_two_chat_templates_part(tmp_path, teacher):
    other = small_hub.TEMPLATE.replace("assistant\n", "assistant: ")
    found = looked(tmp_path, teacher, template=other)
    ((level, text, way_out),) = named(found, "chat template")
    assert level == "warning"
    at = len("Suser\n") + len("3 ") + 60 + len("E\nSassistant")
    assert f"from token {at} on: student " in text
    assert "':'" in text and "/ teacher " in text and "'Ċ'" in text
    assert "copy the teacher's chat_template.jinja to the student" in way_out


def test_a_student_without_a_template(tmp_path, teacher):
    found = looked(tmp_path, teacher, template=None)
    ((level, text, way_out),) = named(found, "chat template")
    assert (level, text) == ("error", "the student's makes no prompt")
    assert "put a chat_template.jinja beside" in way_out


def test_an_end_of_turn_at_which_nothing_stops(tmp_path):
    """The tokenizer says <|endoftext|>, the template <|im_end|>."""
    teacher = hub_directory(tmp_path / "teacher", eos=STOP)
    (found,) = named(looked(tmp_path, teacher, eos=STOP), "ends")
    assert found == (
        "warning",
        f"the chat template ends a text with 1 {END!r}, at which this run does "
        "not stop: completions may go on to the limit",
        "--config.data.end_ids=1",
    )
    changes = {"data__end_ids": (1,)}
    settings = small_hub.settings(tmp_path, teacher, teacher, **changes)
    ((level, text, _),) = named(
        examine.examine_files(settings, tmp_path), "ends"
    )
    assert level == "ok" and f"stops at 2 {STOP!r}, 1 {END!r}; " in text


def test_an_end_that_config_json_alone_knows(tmp_path, teacher):
    student = hub_directory(tmp_path / "student", ends=1)
    edit_config(student, eos_token_id=[1, 2])
    settings = small_hub.settings(tmp_path, student, teacher)
    ((level, text, way_out),) = named(
        examine.examine_files(settings, tmp_path), "ends"
    )
    assert (level, way_out) == ("warning", "--config.data.end_ids=2")
    assert text.startswith(
        f"the student's config.json ends a text with 2 {STOP!r}"
    )


def test_an_end_that_no_row_can_be(tmp_path, teacher):
    found = looked(tmp_path, teacher, ends=[1, 300])
    ((level, text, _),) = named(found, "ends")
    assert level == "error"
    assert "end or pad ids [300] are not below the models' 259 rows" in text


@pytest.mark.parametrize(
    ("begin", "template", "text"),
    [
        (True, small_hub.TEMPLATE, "but prompts of the chat template do not"),
        (False, "{{ bos_token * 2 }}a", "bos twice"),
        (True, "{{ bos_token }}" + small_hub.TEMPLATE, None),
    ],
)  # fmt: skip
def test_how_prompts_begin(begin, template, text):
    class Begun:
        bos_id, begins_texts = 2, begin

        def chat(self, prompt):
            raw = small_hub.small_tokenizer(template)
            raw.bos_token = STOP
            message = [{"role": "user", "content": prompt}]
            return raw.apply_chat_template(message, return_dict=False)

        def vocabulary(self):
            return ["", "", STOP]

    models = {"student": ModelFiles(None, Begun())}
    records = [{"prompt": "a", "answer": "b"}]
    found = [*tokens.beginning(Context(None, models, records, None))]
    assert [f.level for f in found] == (["warning"] if text else [])
    assert text is None or text in found[0].text


# Vocabularies, prompts, several errors.


def test_padded_rows_are_counted(tmp_path, teacher):
    found = looked(tmp_path, teacher, model=copier(8.0, rows=264))
    assert named(found, "vocabulary") == [
        ("ok",
         "259 ids; student 264 rows (5 padded), teacher 259 rows (0 padded); "
         "dropped 5 of the student, the rest renormalized",
         "")
    ]  # fmt: skip


def test_a_model_with_fewer_rows_than_ids(tmp_path, teacher):
    student = hub_directory(tmp_path / "student")
    edit_config(student, vocab_size=200)
    settings = small_hub.settings(tmp_path, student, teacher)
    found = examine.examine_files(settings, tmp_path)
    ((level, text, _),) = named(found, "vocabulary")
    assert (level, text) == (
        "error", "the tokenizer has 259 ids and the student 200 rows"
    )  # fmt: skip


def test_prompts_that_are_too_long(tmp_path, teacher):
    changes = {"data__max_prompt_length": 60}
    found = looked(tmp_path, teacher, changes)
    ((level, text, way_out),) = named(found, "prompts")
    assert level == "error"
    assert text.startswith("100% are longer than allowed: median 81, longest")
    assert way_out.startswith("--config.data.max_prompt_length=82, or")
    skip = changes | {"data__on_long_prompt": "skip"}
    some = skip | {"data__max_prompt_length": 81}
    student = str(tmp_path / "student")
    for changes, level in ((skip, "error"), (some, "warning")):
        settings = small_hub.settings(tmp_path, student, teacher, **changes)
        found = examine.examine_files(settings, tmp_path)
        assert [f[0] for f in named(found, "prompts")] == [level]


def test_a_mesh_without_its_devices_is_one_of_several_errors(tmp_path, teacher):
    changes = {"mesh__fsdp": 3, "data__held_out": 50}
    found = looked(tmp_path, teacher, changes, swapped=("a", "z"))
    assert levels(found) == {
        "mesh": "error", "data": "error", "tokenizers": "error"
    }  # fmt: skip
    ((_, text, way_out),) = named(found, "mesh")
    assert "needs 3 devices and there are" in text
    assert way_out == "set data=-1 to take what the others leave"


# The report, the command, the start of a run.


def test_the_report_is_in_columns():
    report = [
        findings.Finding("ok", "mesh", "1 device"),
        findings.Finding("warning", "ends", "two", "try this"),
        findings.refusal("data", ValueError("no file; give a path")),
    ]
    indent = " " * 15
    assert findings.report(report).splitlines() == [
        "ok       mesh  1 device",
        "warning  ends  two",
        f"{indent}-> try this",
        "error    data  no file",
        f"{indent}-> give a path",
        "1 ok, 1 warning, 1 error",
    ]
    with pytest.raises(ValueError, match=r"1 error: data: no file -> give a"):
        findings.require(report)
    findings.require(report[:2])


def command(tmp_path, student, teacher, *more):
    data = small_hub.questions(tmp_path / "q.jsonl")
    folder = small_hub.__file__.rpartition("/")[0]
    return [
        f"--config={folder}/small_run.py", "--config.data.source=jsonl",
        f"--config.data.path={data}", "--config.data.held_out=3",
        "--config.data.max_prompt_length=120",
        f"--config.student.source={student}",
        f"--config.teacher.source={teacher}", *more,
    ]  # fmt: skip


def test_topd_doctor_prints_and_exits(tmp_path, teacher, capsys):
    student = hub_directory(tmp_path / "student", model=copier(6.0), ends=1)
    line = command(tmp_path, student, teacher)
    with pytest.raises(SystemExit) as exit_:
        main.run(["doctor", *line])
    out = capsys.readouterr().out.splitlines()
    assert exit_.value.code == 0
    assert out[0] == "ok       tokenizers          equal, 259 ids"
    assert out[-1] == "11 ok, 0 warnings, 0 errors"
    other = hub_directory(tmp_path / "other", swapped=("a", "z"))
    line = command(tmp_path, other, teacher, "--json")
    with pytest.raises(SystemExit) as exit_:
        main.run(["doctor", *line])
    assert exit_.value.code == 2
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["level"], first["name"]) == ("error", "tokenizers")


def test_a_world_to_train_needs_no_work_directory(capsys, monkeypatch):
    """What it would train in minutes is left out, and said to be."""
    monkeypatch.chdir("/")
    anew = "--config.world.from_scratch=True"
    with pytest.raises(SystemExit) as exit_:
        main.run(["doctor", "--config=tiny", anew, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    levels = {f["name"]: f["level"] for f in report}
    assert levels == dict.fromkeys(("dtype", "mesh", "memory", "models"), "ok")
    assert "here with --workdir" in report[-1]["text"]


def test_a_run_with_an_error_does_not_begin(tmp_path, teacher, monkeypatch):
    other = hub_directory(tmp_path / "other", swapped=("a", "z"))
    changes = {"train__preflight": True, "data__max_prompt_length": 60}
    settings = small_hub.settings(tmp_path, other, teacher, **changes)
    monkeypatch.setattr(
        "topd_jax.cli.doctor.examine.load_setup", None
    )  # is not reached
    with pytest.raises(
        ValueError,
        match=r"preflight: 2 errors: tokenizers: .*choose a pair.*; prompts: "
        r".*preflight=False skips them",
    ):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_broken_weights_does_not_begin(tmp_path, teacher):
    broken = copier(6.0)
    broken.final_norm[...] = broken.final_norm[...] * float("inf")
    student = hub_directory(tmp_path / "student", model=broken)
    settings = small_hub.settings(
        tmp_path, student, teacher, train__preflight=True
    )
    with pytest.raises(ValueError, match="broken: student's final_norm"):
        train(settings, tmp_path / "run")
