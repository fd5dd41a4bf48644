"""Adapters against peft itself, over tiny random models of transformers."""

import numpy as np
import pytest
from small_files import logits_of
from tiny_configs import VOCAB
from tiny_families import build, torch, transformers

from topd_jax.models import (
    load,
    load_adapter,
    merge_lora,
    save_adapter,
    save_model,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 13))
ATTENTION = ["q_proj", "v_proj"]
# family -> (targets, rank-stabilised)
CASES = {
    "qwen2": ("all-linear", True),
    "qwen3-window": (["o_proj", "k_proj", "up_proj"], False),
    "moe": (ATTENTION, True),
    "phi3": ("all-linear", True),
    "glm4": (["gate_up_proj", "q_proj"], False),
}
# Whose adapters are read and not written.
FUSED = ("phi3", "glm4")


def ours(model):
    return np.asarray(logits_of(model, TOKENS))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def disturb(model):
    """B is zero at first: an adapter that does nothing proves nothing."""
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(0, 0.3)


@pytest.mark.parametrize("family", CASES)
def test_adapters_go_both_ways(family, tmp_path):
    targets, stabilised = CASES[family]
    build(family).save_pretrained(tmp_path / "base")
    base, _ = load(tmp_path / "base")
    model = peft.get_peft_model(
        build(family),
        peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.1,
            use_rslora=stabilised, task_type="CAUSAL_LM",
        ),
    ).eval()  # fmt: skip
    disturb(model)
    want = theirs(model)
    model.save_pretrained(tmp_path / "theirs")

    read = load_adapter(base, tmp_path / "theirs")
    np.testing.assert_allclose(ours(read), want, atol=2e-4)
    assert abs(ours(base) - want).max() > 1e-2
    np.testing.assert_allclose(ours(merge_lora(read)), want, atol=2e-4)

    if family in FUSED:
        return
    save_adapter(read, tmp_path / "ours", base=str(tmp_path / "base"))
    back = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    np.testing.assert_allclose(theirs(back.eval()), want, atol=1e-6)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(theirs(automatic.eval()), want, atol=1e-4)

    kind = build(family).config.model_type
    save_model(read, tmp_path / "merged", model_type=kind)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged"
    ).eval()
    unloaded = model.merge_and_unload()
    got = dict(merged.named_parameters())
    for name, value in unloaded.named_parameters():
        np.testing.assert_allclose(
            got[name].detach(), value.detach(), atol=1e-5, err_msg=name
        )
