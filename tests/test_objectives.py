"""Objectives: presets, spellings, bounds, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import topd_jax as topd
from topd_jax.objectives import loading

# preset -> whether candidates are looked at (some of them), the teacher
# continues them, their states are kept, the student reads along, scoring reads
# the student, and draws are made.
DOES = {
    "opd": "",
    "suppress": "ahead branches",
    "suppress(detector='future_loss')": "ahead",
    "suppress(ranking='token_loss')": "ahead branches student",
    "topd": "ahead some branches along",
    "topd(ranking='random')": "ahead some branches along draws",
    "topd(branch_loss='forward_kl')": "ahead some branches states along",
    "topd(context='student')": "ahead branches",
    "topd_suppress": "ahead branches along",
    "trust_region": "draws",
    "tip": "student",
    "teachability": "student",
    "fire": "student",
    "agreement": "student",
    "prefix": "",
    "retain": "draws",
    "suppress_unlikely": "",
}


@pytest.mark.parametrize("text", DOES)
def test_an_objective_asks_for_what_its_pieces_need(text):
    objective = topd.make_objective(text)
    ahead = objective.near_future is not None
    said = {
        "ahead": ahead,
        "some": ahead and objective.branch_fraction < 1,
        "branches": objective.needs_branches,
        "states": objective.needs_window_hidden,
        "along": objective.trains_on_branch,
        "student": objective.needs_student,
        "draws": objective.draws,
    }
    assert {n for n, is_so in said.items() if is_so} == {*DOES[text].split()}


def far(student_logp, teacher_logp, strength=2.0):
    return strength * topd.reverse_kl(student_logp, teacher_logp)


def test_one_objective_has_one_description():
    def described(objective):
        if isinstance(objective, str):
            objective = topd.make_objective(objective)
        return topd.describe(objective)

    for same, other in (
        ("topd", topd.topd(context="teacher", near_future=topd.NearFuture())),
        ("topd", " topd ( window = 10, branch_loss='cross_entropy' ) "),
        ("topd(epsilon=0.1)",
         topd.topd(near_future=topd.NearFuture(detector=topd.Transport(0.1)))),
        ("opd(token_loss='jsd')", topd.opd(topd.generalized_jsd)),
        (f"opd(token_loss='{__name__}:far', strength=3.0)",
         topd.opd(functools.partial(far, strength=3.0))),
        ("tip(fraction=0.4)", "tip(temperature=1.0, fraction=0.4)"),
    ):  # fmt: skip
        assert described(same) == described(other)
    different = ["topd", "topd(window=11)", "topd(context='student')", "opd",
                 "opd(temperature=2.0)", "opd(log_floor=-50.0)",
                 f"opd(token_loss='{__name__}:far')",
                 f"opd(token_loss='{__name__}:far', strength=3.0)"]  # fmt: skip
    texts = [str(described(text)) for text in different]
    assert len(set(texts)) == len(texts)

    # What a function has closed over belongs to it.
    def bound(strength):
        return topd.describe(lambda x: strength * x)["strength"]

    assert (bound(1), bound(np.inf)) == (1, "inf")
    assert bound(np.float32(0.5)) == bound(jnp.array(0.5)) == 0.5
    assert bound(jax.random.key(1)) != bound(jax.random.key(2))
    assert bound(np.ones(3)) == bound(np.ones(3)) != bound(np.arange(3.0))
    for text in different:
        name, options = loading.parse(text)
        assert loading.spell(name, **options) == text


# A file beside the run.
MINE = """
import topd_jax as topd
class Losses:
    @staticmethod
    def twice(student_logp, teacher_logp, log_floor=-7.0):
        return 2 * topd.reverse_kl(student_logp, teacher_logp,
                                   log_floor=log_floor)
def mine(scale, near_future=topd.NearFuture(window=7)):
    guidance = topd.Guidance(topd.branch_cross_entropy, weight=scale)
    return topd.Objective(near_future=near_future, guidance=guidance)
def wrong(): return 5
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    (tmp_path / "my_objectives.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)


def test_pieces_of_a_file_beside_the_run(beside):
    got = topd.make_objective("my_objectives:mine(scale=0.5, candidates=2)")
    assert got.guidance.weight == 0.5
    # Its own default pieces keep what no option changes.
    assert (got.near_future.window, got.near_future.candidates) == (7, 2)
    got = topd.make_objective(
        "opd(token_loss='my_objectives:Losses.twice', log_floor=-3.0)"
    )
    assert got.token_loss.keywords == {"log_floor": -3.0}
    logp = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -jnp.inf])
    assert_allclose(got.token_loss(*logp), 2 * np.log(0.5) + 3)


def guide(distance, wings):
    return distance


def starred(*all):
    return all


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opd(", "cannot be read; write NAME or"),
        ("opd(1)", "cannot be read"),
        ("opdd", "must be one of opd, suppress,.* or 'package.module:fun"),
        ("opd(window=3)", "no option window; its options: alpha, beta, "),
        ("topd(near_future=3)", "no option near_future"),
        ("opd(beta=0.3)", "beta is an option of token_loss='jsd'; choose that"),
        ("suppress(detector='future_loss', epsilon=1)", "detector='transport'"),
        ("opd(token_loss='k1')", "token_loss='k1' must be one of reverse_kl"),
        ("opd(token_loss=5)", "5 must be a function of student_logp"),
        ("opd(token_loss='.a:f')", "must be one of reverse_kl, .* or 'package"),
        (topd.opd(), "is no text such as .topd.; an Objective is used as"),
        ("nowhere:at_all", "cannot be imported .* beside where topd is"),
        ("my_objectives:nothing", "cannot be imported"),
        ("my_objectives:wrong", "returns int; it must return a topd_jax.Obj"),
        ("my_objectives:mine", "needs the option scale"),
        ("topd(context='both')", "must be 'teacher' or 'student'"),
        ("topd(branch_loss='k1')", "must be one of 'cross_entropy', 'forw"),
        ("topd(anchor_first=True)", "does not exist in context='teacher'"),
        ("topd(context='student', anchor_first='no')", "must be of type bool"),
        ("topd(context='student', branch_loss='forward_kl')", "does not exist"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(beside, text, message):
    with pytest.raises(ValueError, match=message) as error:
        topd.make_objective(text)
    assert "\n" not in str(error.value)


# Option -> values that no preset takes.
BAD = {
    "alpha": [-1.0, "no"],
    "anchor_first": ["no", 5],
    "beta": [-0.1, 1.1, "no"],
    "branch_fraction": [0.0, 1.01],
    "branch_loss": ["no", 5],
    "branch_temperature": [-0.1],
    "candidates": [0, 2.5, "no"],
    "cap": [-1.0],
    "clip": [0.0, -1.0, 1e999, "no"],
    "context": ["no", 5],
    "detector": ["no", 5],
    "discount": [-0.1, 1.1],
    "drop": [-0.1, 1.1],
    "entropy_threshold": [-1.0, 1e999, "no"],
    "epsilon": [0.0, 1e-9, 11.0],
    "fraction": [0.0, 1.01],
    "gamma": [-1.0, 1e999],
    "guidance_share": [0.0, 1.1, "no"],
    "guidance_weight": [-1.0, 1e999, "no"],
    "log_floor": [0.0, 1.0, -1e999, "no"],
    "loss_threshold": [-1.0, "no"],
    "n": [0, 2.5],
    "percentile": [-0.1, 100.1],
    "position_weight": [-1.0, 11.0],
    "probability": [0.0, 1.1, "no"],
    "quantile": [-0.1, 1.1],
    "ranking": ["no", 5],
    "strength": [-1.0, "no"],
    "temperature": [0.0, -1.0, 1e308, "no"],
    "threshold": [-1.0, "no"],
    "token_loss": ["no", 5],
    "top_k": [0, 2.5],
    "window": [0, 2.5],
}
# Options -> what an objective needs besides to have them.
WITH = {
    "anchor_first": {"context": "student"},
    "beta": {"token_loss": "jsd"},
    "clip": {"token_loss": "clipped_reverse_kl"},
    "alpha": {"token_loss": "forward_kl_at_high_loss"},
    "loss_threshold": {"token_loss": "forward_kl_at_high_loss"},
}


def test_guidance_may_end_before_the_run():
    whole = topd.topd()
    assert whole.phases(10) == ((10, whole),)
    early = topd.topd(guidance_share=0.25)
    plain = dataclasses.replace(early, near_future=None, guidance=None)
    assert early.phases(10) == ((3, early), (10, plain))
    assert early.phases(1) == ((1, early),)
    # What weights look at goes on.
    capped = topd.topd_suppress(guidance_share=0.25)
    (_, _), (_, then) = capped.phases(10)
    assert then == dataclasses.replace(capped, guidance=None)


@pytest.mark.parametrize("name", topd.PRESETS)
def test_every_option_is_bounded_at_construction(name):
    for option in loading.options_of(topd.PRESETS[name]):
        for value in BAD[option]:
            more = WITH.get(option, {}) if name != "entropy_aware" else {}
            text = loading.spell(name, **more, **{option: value})
            text = text.replace("=inf", "=1e999").replace("=-inf", "=-1e999")
            with pytest.raises(ValueError, match=f"objective=.*{name}.* must"):
                topd.make_objective(text)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (topd.Guidance, {"loss": guide}, ":guide names wings; it may"),
        (topd.Guidance, {"loss": 5}, "5 is no piece of an objective"),
        (topd.Objective, {"temperature": True}, "must be of type float"),
        (topd.Objective, {"near_future": "no"}, "like near_future=NearFuture"),
        (topd.Objective, {"token_weights": far}, "like token_weights=.weight,"),
        (topd.Objective, {"token_weights": (starred,)}, "names all; it may"),
        (
            topd.Objective,
            {"guidance": topd.Guidance(lambda distance: 0)},
            "needs candidates; give the objective a near_future=NearFuture",
        ),
        (
            topd.Objective,
            {"token_loss": lambda student, teacher: student},
            r"returns \[1, 4\] for one token of 4 logits; it must return one",
        ),
        (
            topd.Objective,
            {"statistics": {"s": lambda s, t, mask: s}},
            r"statistics\['s'\]: .* names mask; it may name tokens",
        ),
    ],
)
def test_what_is_no_piece_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_loss_may_be_of_one_vocabulary():
    """By a table of its ids, or of more of them than a trial's few."""
    table = jnp.ones(64)

    def weighed(student, teacher):
        return jnp.sum(table * (teacher - student), axis=-1)

    def best(student, teacher):
        return jax.lax.top_k(teacher, 16)[0][:, 0] - student[:, 0]

    for loss in (weighed, best):
        topd.Objective(loss, statistics={"its": loss})
    with pytest.raises(ValueError, match=r"k=0 must be a whole number"):
        topd.Objective(functools.partial(topd.top_k_forward_kl, k=0))


def test_an_objective_is_a_static_argument():
    objective = topd.make_objective("teachability")
    same = dataclasses.replace(objective)
    assert {objective: 1}[same] == 1
    assert {topd.topd(): 1}[topd.topd()] == 1
    assert topd.topd() != topd.topd(guidance_weight=0.2)
