"""The preflight's check of the attention kernels, interpreted here."""

import jax
import pytest
from interpreted import interpreted_kernels

from topd_jax.cli.doctor import kernels as doctor
from topd_jax.models import DecoderConfig
from topd_jax.models.attention import flash, flash_decode


class Model:
    """A model as far as the check looks at it."""

    config = DecoderConfig(
        vocab_size=40, layers=2, width=32, heads=4, kv_heads=2, head_dim=16,
        mlp_width=32, window=60, sliding=(True, False), attention="flash",
        dtype="bfloat16", attention_softcap=5.0,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Has a CPU take the kernels where a TPU would; names those called."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with interpreted_kernels() as calls:
        yield calls


def scaled(monkeypatch):
    plain = flash.kernels._scores

    def broken(*args):
        scores, mask = plain(*args)
        return scores * 1.2, mask

    monkeypatch.setattr(flash.kernels, "_scores", broken)


def without_the_first_block(monkeypatch):
    plain = flash_decode._block

    def late(sizes, table, row, step):
        block, needed = plain(sizes, table, row, step)
        return block, needed & (step > 0)

    monkeypatch.setattr(flash_decode, "_block", late)
    monkeypatch.setattr(flash_decode, "_FEW_BYTES", 0)


def test_kernels_that_do_what_blocks_do(calls):
    (fine,) = doctor.kernels({"student": Model, "teacher a": object()})
    assert fine.level == "ok" and "2 heads of 16 a key, bfloat16" in fine.text
    assert {name for name, *_ in calls} == {"forward", "backward", "read"}


def test_without_a_tpu_or_flash_there_is_nothing_to_compare(monkeypatch):
    assert [*doctor.kernels({"student": Model})] == []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [*doctor.kernels({"student": object()})] == []


@pytest.mark.parametrize(
    ("broken", "compare"),
    [(scaled, "_read"), (without_the_first_block, "_decode")],
)
def test_broken_kernels(calls, monkeypatch, broken, compare):
    broken(monkeypatch)
    off = getattr(doctor, compare)(doctor._shape(Model.config))
    assert off > 0.03
    monkeypatch.setattr(doctor, "_read", lambda _: 0.0)
    monkeypatch.setattr(doctor, "_decode", lambda _: 0.0)
    monkeypatch.setattr(doctor, compare, lambda _: off)
    (found,) = doctor.kernels({"teacher a": Model})
    assert found.level == "error" and "the limit is 0.03" in found.text
    assert found.way_out == "--config.teachers.a.attention=blocks"
