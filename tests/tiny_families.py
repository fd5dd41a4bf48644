"""Tiny random models of transformers, one a family and option."""

import pytest
from tiny_configs import MODELS, SHAPE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "depth": 1,
    "num_heads": 2, "out_hidden_size": 48,
}  # fmt: skip
# name -> (class, model_type of its encoder of images, of MODELS its text)
WRAPPERS = {
    "gemma3": ("Gemma3", "siglip_vision_model", "gemma3"),
    "mistral3": ("Mistral3", "pixtral", "mistral-null"),
    "mistral3-ministral3": ("Mistral3", "pixtral", "ministral3"),
    "qwen3.5-images": ("Qwen3_5", "qwen3_5_vision", "qwen3.5"),
}


def build(name):
    """A random model, its norms and biases far from where they start."""
    family, fields = MODELS[name]
    text = "Text" if family in ("Gemma3", "Qwen3_5", "Qwen3_5Moe") else ""
    config = getattr(transformers, f"{family}{text}Config")(**SHAPE | fields)
    return random(getattr(transformers, f"{family}ForCausalLM"), config)


def wrap(name, **fields):
    """The same beside an encoder of images."""
    family, images, text = WRAPPERS[name]
    config = getattr(transformers, f"{family}Config")(
        text_config=build(text).config.to_dict(),
        vision_config=IMAGES | {"model_type": images}, **fields,
    )  # fmt: skip
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    return random(kind, config)


def random(kind, config):
    family = kind.__name__
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    for key, value in model.named_parameters():
        if "norm" in key:
            centered = "Gemma" in family or "Next" in family or "_5" in family
            low = -0.5 if centered and "linear_attn" not in key else 0.5
            value.data.uniform_(low, low + 1)
        elif key.endswith(("bias", "sinks")):
            value.data.uniform_(-0.5, 0.5)
        elif "conv1d" in key:  # else a norm makes much of tiny outputs
            value.data.uniform_(0.5, 1.5)
        elif "expert" in key or "mlp.gate.weight" in key:
            value.data.normal_(0, 0.2)
    return model
