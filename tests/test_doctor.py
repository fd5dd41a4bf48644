"""The preflight: what fits, and every kind of misfit with its way out."""

import types

import pytest
import small_hub
import small_run
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


def looked(tmp_path, teacher, changes=(), config=(), **options):
    """What the first stage says of a doctored student."""
    student = hub_directory(tmp_path / "student", **options)
    edit_config(student, **dict(config))
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


PIECES = small_hub.small_tokenizer().get_vocab()
A, Z = PIECES["a"], PIECES["z"]
OTHER = small_hub.TEMPLATE.replace("assistant\n", "assistant: ")
PARTS = len("Suser\n") + len("3 ") + 60 + len("E\nSassistant")
LONG = {"data__max_prompt_length": 60}
SKIP = {"data__on_long_prompt": "skip"}

# What is wrong with a student (its directory, its config.json, the settings),
# and the finding: its name, level, parts of its text, of its way out.
MISFITS = [
    (dict(swapped=("a", "z")), {}, {}, "tokenizers", "error", (
        "different vocabularies (259 and 259 ids): 2 ids differ",
        f"(id: student / teacher) {A}: 'z' / 'a', {Z}: 'a' / 'z'",
    ), "choose a pair that shares one tokenizer"),
    (dict(template=OTHER), {}, {}, "chat template", "warning", (
        f"from token {PARTS} on: student ", "':'", "/ teacher ", "'Ċ'",
    ), "copy the teacher's chat_template.jinja to the student"),
    (dict(template=None), {}, {}, "chat template", "error",
     ("the student's makes no prompt",), "put a chat_template.jinja beside"),
    # The tokenizer says <|endoftext|>, the template <|im_end|>.
    (dict(eos=STOP), {}, {}, "ends", "warning", (
        f"the chat template ends a text with 1 {END!r}, at which this run does "
        "not stop: completions may go on to the limit",
    ), "--config.data.end_ids=1"),
    (dict(eos=STOP), {}, {"data__end_ids": (1,)}, "ends", "ok",
     (f"stops at 2 {STOP!r}, 1 {END!r}; ",), ""),
    (dict(ends=1), {"eos_token_id": [1, 2]}, {}, "ends", "warning",
     (f"the student's config.json ends a text with 2 {STOP!r}",),
     "--config.data.end_ids=2"),
    (dict(ends=[1, 300]), {}, {}, "ends", "error",
     ("end or pad ids [300] are not below the models' 259 rows",), ""),
    (dict(model=copier(8.0, rows=264)), {}, {}, "vocabulary", "ok", (
        "259 ids; student 264 rows (5 padded), teacher 259 rows (0 padded); "
        "dropped 5 of the student, the rest renormalized",
    ), ""),
    ({}, {"vocab_size": 200}, {}, "vocabulary", "error",
     ("the tokenizer has 259 ids and the student 200 rows",), ""),
    ({}, {}, LONG, "prompts", "error",
     ("100% are longer than allowed: median 81, longest",),
     "--config.data.max_prompt_length=82, or"),
    ({}, {}, LONG | SKIP, "prompts", "error", (), ""),
    ({}, {}, SKIP | {"data__max_prompt_length": 81}, "prompts", "warning",
     (), ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "config", "changes", "name", "level", "texts", "way_out"),
    MISFITS,
)
def test_misfits_have_a_finding_and_a_way_out(
    tmp_path, teacher, options, config, changes, name, level, texts, way_out
):
    if "eos" in options:  # the teacher's ends count as well
        teacher = hub_directory(tmp_path / "teacher", **options)
    found = looked(tmp_path, teacher, changes, config, **options)
    ((got, text, way),) = named(found, name)
    assert got == level
    assert all(part in text for part in texts), text
    assert way_out in way


def said_of(check, record, **tokenizers):
    """What a check says of models of which only tokenizers are there."""
    models = {who: ModelFiles(None, t) for who, t in tokenizers.items()}
    return [*check(Context(None, models, [record], None))]


def words(begin):
    """A tokenizer of six pieces, one a word."""
    return types.SimpleNamespace(
        vocab_size=6, vocabulary=lambda: [*"abcdef"], chat=lambda text: [5],
        encode=lambda text: [len(w) + begin for w in text.split()],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("begin", "level", "text"),
    [
        (0, "ok", "the same on 1 records"),
        (2, "warning", "differs from token 0 on: student 1 'b', 2 'c' / "
         "teacher 3 'd', 4 'e'"),
    ],
)  # fmt: skip
def test_the_same_pieces_may_be_cut_in_another_way(begin, level, text):
    found = said_of(
        tokens.templates, {"prompt": "p", "answer": "a bc"},
        student=words(0), teacher=words(begin),
    )  # fmt: skip
    assert [f.level for f in found if f.name == "chat template"] == ["ok"]
    ((got, said, _),) = named(found, "encoding")
    assert (got, said) == (level, text)


@pytest.mark.parametrize(
    ("begin", "template", "text"),
    [
        (True, small_hub.TEMPLATE, "but prompts of the chat template do not"),
        (False, "{{ bos_token * 2 }}a", "bos twice"),
        (True, "{{ bos_token }}" + small_hub.TEMPLATE, None),
    ],
)  # fmt: skip
def test_how_prompts_begin(begin, template, text):
    def chat(prompt):
        raw = small_hub.small_tokenizer(template)
        raw.bos_token = STOP
        message = [{"role": "user", "content": prompt}]
        return raw.apply_chat_template(message, return_dict=False)

    student = types.SimpleNamespace(
        bos_id=2, begins_texts=begin, chat=chat,
        vocabulary=lambda: ["", "", STOP],
    )  # fmt: skip
    record = {"prompt": "a", "answer": "b"}
    found = said_of(tokens.beginning, record, student=student)
    assert [f.level for f in found] == (["warning"] if text else [])
    assert text is None or text in found[0].text


def test_a_mesh_without_its_devices_is_one_of_several_errors(tmp_path, teacher):
    changes = {"mesh__fsdp": 3, "data__held_out": 50}
    found = looked(tmp_path, teacher, changes, swapped=("a", "z"))
    assert levels(found) == {
        "mesh": "error", "data": "error", "tokenizers": "error"
    }  # fmt: skip
    ((_, text, way_out),) = named(found, "mesh")
    assert "needs 3 devices and there are" in text
    assert way_out.endswith("and data=-1 takes what the others leave")


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


def command(tmp_path, student, teacher):
    data = small_hub.questions(tmp_path / "q.jsonl")
    return [
        f"--config={small_run.__file__}", "--config.data.source=jsonl",
        f"--config.data.path={data}", "--config.data.held_out=3",
        "--config.data.max_prompt_length=120",
        f"--config.student.source={student}",
        f"--config.teacher.source={teacher}",
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
    line = command(tmp_path, other, teacher)
    with pytest.raises(SystemExit) as exit_:
        main.run(["doctor", *line])
    assert exit_.value.code == 2
    assert capsys.readouterr().out.startswith("error    tokenizers")


def test_a_world_to_train_needs_a_work_directory(refused):
    config = f"--config={small_run.__file__}"
    line = refused("doctor", config, "--config.world.from_scratch=True")
    assert line.endswith("say where by --workdir DIR")


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
