"""``topd inspect``: a page that shows what the detector sees."""

import pathlib
from typing import Any

from topd_jax.experiments import token_map
from topd_jax.experiments.observe import looking_ahead, observe
from topd_jax.parallel import hosts
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run


def inspect(
    settings: Settings, workdir: pathlib.Path, which: str, count: int
) -> dict[str, Any]:
    """Write a page that shows what the detector sees in trajectories.

    Args:
      settings: of the run.
      workdir: of the run; ``inspect-WHICH.html`` is written there.
      which: "latest", "best" or "start".
      count: test prompts that the student completes for it.

    Returns:
      "page", its path, "step" and the numbers of "trajectories" and
      "candidates".
    """
    ahead = looking_ahead(settings)
    window = ahead.near_future.window
    with open_run(settings, workdir, which) as (setup, student, step):
        batches = list(observe(settings, setup, student, count, [ahead]))
    facts = {
        "student": f"{which}, step {step}",
        "objective": settings.objective,
        "window": f"{window} tokens",
        "run": workdir.name,
    }
    page = workdir / f"inspect-{which}.html"

    def write() -> dict[str, Any]:
        rows = [
            row
            for seen in batches
            for row in token_map.trajectories_of(
                seen,
                setup,
                window=window,
                is_world=settings.data.source == "world",
            )
        ]
        about = {"title": "Trajectories under the detector", "facts": facts}
        token_map.write_page(rows, about, page)
        return {
            "page": str(page),
            "step": step,
            "trajectories": len(rows),
            "candidates": sum(
                bool(t["candidate"]) for r in rows for t in r["tokens"]
            ),
        }

    return hosts.from_first(write)
