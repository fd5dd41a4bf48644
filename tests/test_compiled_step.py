"""What the programs of a step do, and how that grows with their sizes.

Operations are counted from the lowered programs, which takes no compiling;
bytes, in a slow test, from the compiled ones.
"""

import functools
import math

import jax
import pytest

from topd_jax.configs import default
from topd_jax.models.attention import core
from topd_jax.models.parameters import parameter_table
from topd_jax.objectives.loading import spell
from topd_jax.parallel import sharding
from topd_jax.planning import hlo, hlo_cost
from topd_jax.planning.programs import calls
from topd_jax.training.config import settings_from

ROWS, PROMPT, VOCAB, WIDTH = 4, 8, 640, 32


@pytest.fixture(scope="module", autouse=True)
def branches_are_never_few():
    """Few are read under one mask with their prefix, a square of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_FEW_BEHIND", 0)
        yield


@functools.cache
def lowered(name, T=16, V=VOCAB, M=4, K=8):
    config = default.get_config()
    config.data.batch_size = config.eval.batch_size = ROWS
    config.data.max_prompt_length = PROMPT
    config.rollout.max_new_tokens = T
    config.objective = spell(
        "topd", context="teacher", candidates=M, window=K, branch_fraction=1.0
    )
    config.train.chunk_size = 32
    config.world.vocab_size = V
    for model in ("student", "teacher"):
        config.world[f"{model}_layers"] = 1
        config.world[f"{model}_width"] = WIDTH
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        call = calls(settings_from(config), mesh)[name]
        return call, call.fn.lower(*call.args)


def program(name, **sizes):
    return hlo.parse(lowered(name, **sizes)[1].as_text(dialect="hlo"))


def flops(name, **sizes):
    return hlo_cost.count(program(name, **sizes)).flops


@functools.cache
def compiled_cost(name, **sizes):
    compiled = lowered(name, **sizes)[1].compile()
    return hlo_cost.count(hlo.parse(compiled.as_text()))


def forward(config, tokens, keys, logits):
    """Operations that a decoder must do (arXiv:2204.02311, appendix B)."""
    head = 2 * config.vocab_size * config.width
    attention = 4 * config.layers * config.heads * config.head_dim
    rows = parameter_table(config).values()
    layers = 2 * sum(math.prod(r.shape) for r in rows if r.axes[0] == "layers")
    return layers * tokens + attention * keys + head * logits


def test_a_rollout_computes_what_its_model_must():
    T = 16
    config = lowered("rollout")[0].args[0].config
    prefill = forward(config, PROMPT, PROMPT**2 / 2, 1)
    decode = forward(config, T - 1, T * (PROMPT + T / 2), T - 1)
    least = ROWS * (prefill + decode)
    assert 0.9 * least <= flops("rollout") <= 1.2 * least


def test_a_train_step_computes_little_more_than_its_models_must():
    student, (teacher,) = lowered("score")[0].args[:2]
    new, whole, steps = 16, PROMPT + 16, 4 * 7
    # The student reads the rollout and the teacher's branches, which attend
    # to half of it on average; forward, and twice backward.
    keys = steps * (PROMPT + new // 2 + 4)
    read = forward(student.config, whole, whole**2 / 2, new)
    read = 3 * (read + forward(student.config, steps, keys, steps))
    head = 2 * teacher.model.config.vocab_size * teacher.model.config.width
    least = ROWS * (read + head * new)
    # Masked scores are computed, and the head of chunks once more.
    assert least <= flops("train_step") <= 1.3 * least


@pytest.mark.parametrize(
    ("name", "size", "start"), [("score", "M", 4), ("train_step", "V", VOCAB)]
)
def test_operations_are_linear(name, size, start):
    one = flops(name)
    two, four = (flops(name, **{size: n * start}) for n in (2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-6)
    assert two > 1.1 * one


@pytest.mark.parametrize("name", ["score", "train_step"])
def test_no_program_holds_all_logits(name):
    sizes = [
        array.size
        for computation in program(name).computations.values()
        for instruction in computation.instructions.values()
        for array in instruction.arrays
        if VOCAB in array.shape
    ]
    assert sizes and max(sizes) < ROWS * 16 * VOCAB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half", "whole", "most"),
    [
        ("rollout", {}, dict(T=32), 2.6),
        ("rollout", {}, dict(V=1280), 1.6),
        ("score", {}, dict(T=32), 2.0),
        ("score", dict(K=4), {}, 2.5),
        ("score", {}, dict(M=8), 2.0),
        ("train_step", {}, dict(T=32), 2.0),
        ("train_step", dict(K=4), {}, 2.0),
        ("train_step", {}, dict(M=8), 2.0),
    ],
)
def test_a_doubling_does_no_more_than_it_should(name, half, whole, most):
    before, after = compiled_cost(name, **half), compiled_cost(name, **whole)
    assert before.flops <= after.flops <= most * before.flops
    assert before.bytes < after.bytes <= most * before.bytes
