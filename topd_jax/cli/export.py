"""``topd export``: a trained student as a Hugging Face directory."""

import pathlib
from typing import Any

from topd_jax.models import dequantize, describe, save_adapter, save_model
from topd_jax.models.adapters import require_adapter
from topd_jax.models.io.export import check_free
from topd_jax.parallel import buckets, hosts
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run


def export(
    settings: Settings,
    workdir: pathlib.Path,
    which: str,
    output: pathlib.Path,
    adapter: bool = False,
) -> dict[str, Any]:
    """Write a trained student to a Hugging Face directory.

    Adapters are merged, unless they are what is asked for; a quantized base is
    floats then.

    Args:
      settings: of the run.
      workdir: of the run.
      which: "latest", "best" or "start".
      output: an empty or new directory.
      adapter: write a LoRA student's adapters alone, as PEFT loads them.

    Returns:
      "output" and the "step" of the student.

    Raises:
      ValueError: where ``output`` is not free, there is no checkpoint, or no
        adapter to write.
    """
    check_free(output)
    if adapter:
        require_adapter(settings.student)
    with open_run(settings, workdir, which) as (setup, student, step):
        if adapter:
            with buckets.uploaded(output) as folder:
                save_adapter(student, folder, base=setup.student_source)
            return {"output": str(output), "step": step}
        tokenizer = setup.tokenizer
        # All ends that the run knew: generation stops where it did here.
        ends = list(tokenizer.eos_ids)
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": tokenizer.pad_id,
        }
        if not settings.student.in_world:
            # Servers read no longer rows than this, whose default is short.
            longest = describe(settings.student.source).longest
            ids |= {"max_position_embeddings": longest} if longest else {}
        with buckets.uploaded(output) as folder:
            # None of sentencepiece, which writes its own files.
            hub = getattr(tokenizer, "wrapped", None)
            # A quantized base is written as the floats that it computes as.
            save_model(dequantize(student), folder, tokenizer=hub, extra=ids)
            if hub is None and hosts.is_first():
                tokenizer.save_pretrained(folder)
    return {"output": str(output), "step": step}
