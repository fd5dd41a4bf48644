"""The peers' virtual environments, made once."""

import subprocess
import sys
from pathlib import Path

# The groups of one environment are installed one after another.
PACKAGES = {
    "tunix": [["google-tunix==0.1.7"]],
    "torch": [
        ["torch==2.13.0"],
        [
            "trl==1.16.0", "transformers", "accelerate", "datasets",
            "liger-kernel", "gguf",
        ],
    ],
}  # fmt: skip


def interpreter(name: str, directory: Path) -> str:
    """Return the Python of a peer's environment, making it where missing.

    Args:
      name: of :data:`PACKAGES`.
      directory: where all of them are.

    Raises:
      RuntimeError: with pip's last words, where it cannot be made.
    """
    home = directory / name
    python = home / "bin" / "python"
    if (home / "ready").exists():
        return str(python)
    lines = [[sys.executable, "-m", "venv", "--clear", str(home)]]
    for group in PACKAGES[name]:
        lines.append([str(python), "-m", "pip", "install", "-q", *group])
    for line in lines:
        print(*line, file=sys.stderr, flush=True)
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(f"{' '.join(line[1:])}: {words[-1]}")
    (home / "ready").touch()
    return str(python)
