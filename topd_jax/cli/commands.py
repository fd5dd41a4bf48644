"""What each command of ``topd`` does; settings in, JSON-able results out."""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.cli.doctor.examine import examine
from topd_jax.cli.doctor.findings import Finding
from topd_jax.data import prompts as prompt_data
from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.evaluation import benchmarking
from topd_jax.experiments import sweep as sweeping
from topd_jax.models import save_model
from topd_jax.models.io.peft import save_adapter
from topd_jax.sampling import rollout
from topd_jax.training import generation
from topd_jax.training import loop as training
from topd_jax.training.adapters import require_adapter
from topd_jax.training.config import Settings
from topd_jax.training.restore import load_student, require_checkpoint
from topd_jax.training.setup import load_pair
from topd_jax.training.teachers import shared_rows


def train(settings: Settings, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains; the same command again resumes.

    Args:
      settings: of the run.
      workdir: of the run.

    Returns:
      The final evaluation.
    """
    return training.train(settings, workdir)


def generate(
    settings: Settings, workdir: pathlib.Path, count: int | None
) -> dict[str, Any]:
    """Lets the teacher write; the same command again resumes.

    Args:
      settings: of the teacher, the prompts and how it writes.
      workdir: where ``solutions`` is written.
      count: prompts, from the first on; None takes them all.

    Returns:
      The set's path, what it holds, and tokens a second.
    """
    return generation.generate(settings, workdir, count)


def sweep(settings: Settings, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs every variant on every seed, then writes the report.

    Args:
      settings: of the runs; ``settings.sweep`` names them.
      workdir: of the sweep.

    Returns:
      Where the report's files are.
    """
    return sweeping.sweep(settings, workdir)


def doctor(settings: Settings, workdir: pathlib.Path) -> list[Finding]:
    """Looks whether a run's parts fit, and changes nothing.

    Args:
      settings: of the run.
      workdir: of the run; the tiny world's models are made there.

    Returns:
      The findings.
    """
    return examine(settings, workdir)


def evaluate(
    settings: Settings, workdir: pathlib.Path, which: str
) -> dict[str, Any]:
    """Evaluates a trained student on test problems or benchmarks.

    Args:
      settings: of the run; ``settings.eval`` names samples and benchmarks.
      workdir: of the run; ``eval-WHICH.json``, with a record of every
        problem, is written there.
      which: "latest", "best" or "start".

    Returns:
      The evaluation without the records.
    """
    require_checkpoint(workdir, which)
    pair = load_pair(settings, workdir)
    with jax.set_mesh(pair.mesh):
        student, step = load_student(settings, workdir, pair, which)
        found = benchmarking.evaluate_all(settings, pair, student, step)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / f"eval-{which}.json").write_text(json.dumps(found, indent=1))
    return benchmarking.summaries(found)


def compare(a: list[str], b: list[str], which: str) -> dict[str, Any]:
    """Compares evaluated runs on the same problems.

    Args:
      a: work directories of one method, one a seed.
      b: of the other, as many.
      which: "latest", "best" or "start".

    Returns:
      Benchmark -> difference, interval and test.
    """
    return benchmarking.compare_runs(
        [pathlib.Path(d) for d in a], [pathlib.Path(d) for d in b], which
    )


def report(
    workdir: str, others: list[str], output: str | None
) -> dict[str, Any]:
    """Writes a page of a run, or of several laid over each other.

    Args:
      workdir: of the run.
      others: of further runs.
      output: the HTML file; None is ``report.html`` in ``workdir``.

    Returns:
      "page", its path, and how far each of the "runs" is.
    """
    # Here, not above: only this command needs a template engine.
    from topd_jax.experiments import run_page

    return run_page.report(
        [pathlib.Path(d) for d in (workdir, *others)],
        output and pathlib.Path(output),
    )


def inspect(
    settings: Settings, workdir: pathlib.Path, which: str, count: int
) -> dict[str, Any]:
    """Writes a page that shows what the detector sees in trajectories.

    Args:
      settings: of the run.
      workdir: of the run; ``inspect-WHICH.html`` is written there.
      which: "latest", "best" or "start".
      count: test prompts that the student completes for it.

    Returns:
      "page", its path, "step" and the numbers of "trajectories" and
      "candidates".
    """
    # Here, not above: only this command needs a template engine.
    from topd_jax.experiments import token_map
    from topd_jax.experiments.observe import observe

    require_checkpoint(workdir, which)
    pair = load_pair(settings, workdir)
    with jax.set_mesh(pair.mesh):
        student, step = load_student(settings, workdir, pair, which)
        rows = [
            row
            for seen in observe(settings, pair, student, count)
            for row in token_map.trajectories_of(
                seen,
                pair,
                window=settings.objective.window,
                is_world=settings.data.source == "world",
            )
        ]
    facts = {
        "student": f"{which}, step {step}",
        "variant": settings.objective.variant,
        "window": f"{settings.objective.window} tokens",
        "run": workdir.name,
    }
    page = workdir / f"inspect-{which}.html"
    token_map.write_page(
        rows, {"title": "Trajectories under the detector", "facts": facts}, page
    )
    return {
        "page": str(page),
        "step": step,
        "trajectories": len(rows),
        "candidates": sum(len(r["candidates"]) for r in rows),
    }


def probe(
    settings: Settings, workdir: pathlib.Path, which: str, count: int
) -> dict[str, Any]:
    """Measures whether high loss means that the futures part (§2.1).

    Args:
      settings: of the run; ``objective.candidates`` positions a row and group.
      workdir: of the run; ``probe-WHICH`` with the JSON and figures is
        written there.
      which: "latest", "best" or "start".
      count: test prompts that the student completes for it.

    Returns:
      The numbers, those of the paper and the figures' paths.
    """
    # Here, not above: scipy's statistics and matplotlib take seconds.
    from topd_jax.experiments import probe as probing
    from topd_jax.experiments.observe import observe

    require_checkpoint(workdir, which)
    pair = load_pair(settings, workdir)
    window = settings.objective.window
    with jax.set_mesh(pair.mesh):
        student, step = load_student(settings, workdir, pair, which)
        found = probing.collect(
            observe(settings, pair, student, count, probing.scores_for(window))
        )
    folder = workdir / f"probe-{which}"
    numbers = probing.report(found)
    result = {
        "machine": sweeping.machine(),
        "seed": settings.seed,
        "step": step,
        "prompts": count,
        "window": window,
        **numbers,
        "paper": probing.PAPER,
        "figures": probing.figures(found, folder),
    }
    positions = {
        group: {name: v.tolist() for name, v in values.items()}
        for group, values in found.items()
    }
    (folder / "probe.json").write_text(
        json.dumps(result | {"positions": positions}, indent=1)
    )
    print(probing.table(numbers), file=sys.stderr, flush=True)
    return result


def quantize(
    settings: Settings, workdir: pathlib.Path, which: str, count: int
) -> dict[str, Any]:
    """Measures what a teacher in fewer bits costs.

    Args:
      settings: of the run; ``teacher.quantize_tile`` of both kinds. The
        teacher itself is loaded as floats.
      workdir: of the run; ``quantize-WHICH.json`` is written there.
      which: "latest", "best" or "start".
      count: test prompts that the student completes for it.

    Returns:
      "machine", "source", "seed", "step", "count" and the "rows" of
      :func:`~topd_jax.experiments.quantization.measure`.
    """
    from topd_jax.experiments import quantization

    require_checkpoint(workdir, which)
    pair = load_pair(settings, workdir)
    with jax.set_mesh(pair.mesh):
        student, step = load_student(settings, workdir, pair, which)
        rows = quantization.measure(settings, pair, student, count)
    result = {
        "machine": sweeping.machine(),
        "source": settings.teacher.source,
        "seed": settings.seed,
        "step": step,
        "count": count,
        "rows": rows,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / f"quantize-{which}.json").write_text(json.dumps(result))
    print(quantization.table(rows), file=sys.stderr, flush=True)
    return result


def sample(
    settings: Settings,
    workdir: pathlib.Path,
    which: str,
    texts: list[str],
    temperature: float | None,
) -> list[dict[str, str]]:
    """Lets a trained student complete some prompts.

    Args:
      settings: of the run.
      workdir: of the run.
      which: "latest", "best" or "start".
      texts: prompts, before any chat template; none takes three test ones.
      temperature: of the sampler; None takes ``rollout.temperature``.

    Returns:
      One dictionary a prompt, with "prompt" and "completion".
    """
    require_checkpoint(workdir, which)
    pair = load_pair(settings, workdir)
    texts = texts or [r["prompt"] for r in pair.test.records[:3]]
    records = [
        {"prompt": t, "answer": "", "index": i, "source": "--prompt"}
        for i, t in enumerate(texts)
    ]
    tokenizer, options = pair.tokenizer, settings.rollout
    encoded = prompt_data.encode_prompts(
        records, tokenizer, max_length=settings.data.max_prompt_length
    )
    (batch,) = prompt_data.ordered_batches(encoded, batch_size=len(texts))
    if temperature is None:
        temperature = options.temperature
    student, _ = load_student(settings, workdir, pair, which)
    written = rollout(
        student,
        jax.tree.map(jnp.asarray, batch.prompts),
        jax.random.key(settings.seed),
        max_new_tokens=options.max_new_tokens,
        temperature=temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        vocab_size=shared_rows(student, pair.teacher),
    )
    tokens, mask = jax.device_get((written.tokens, written.mask))
    return [
        {
            "prompt": text,
            "completion": tokenizer.decode(tokens[i][mask[i]].tolist()),
        }
        for i, text in enumerate(texts)
    ]


def export(
    settings: Settings,
    workdir: pathlib.Path,
    which: str,
    output: pathlib.Path,
    adapter: bool = False,
) -> dict[str, Any]:
    """Writes a trained student to a Hugging Face directory.

    Adapters are merged, unless they are what is asked for.

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
    if output.exists() and not (output.is_dir() and not [*output.iterdir()]):
        raise ValueError(
            f"--output {output} exists and is not empty; choose another "
            "directory, or empty it"
        )
    require_checkpoint(workdir, which)
    if adapter:
        require_adapter(settings.student)
    pair = load_pair(settings, workdir)
    student, step = load_student(settings, workdir, pair, which)
    if adapter:
        save_adapter(student, output, base=pair.student_source)
        return {"output": str(output), "step": step}
    tokenizer = pair.tokenizer
    # All ends that the run knew, so that generation stops where it did here.
    ends = list(tokenizer.eos_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
    }
    save_model(student, output, tokenizer=pair.hub_tokenizer, extra=ids)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save_pretrained(output)
    return {"output": str(output), "step": step}
