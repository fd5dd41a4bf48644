"""What users install: the archives, and the licences of what comes along."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TOP = Path(__file__).parents[1]
# Of these, what a dependency says must name one: they allow any use.
PERMISSIVE = re.compile(
    r"Apache|MIT|BSD|ISC|MPL|Mozilla Public License|PSF|Python Software "
    r"Foundation|HPND|Unlicense|CC0|Zlib",
    re.IGNORECASE,
)
RESTRICTIVE = re.compile(r"\b(A|L)?GPL|GNU|Commercial|Proprietary", re.I)


def licence_of(name: str) -> str:
    """What a distribution says about its licence, in one line."""
    about = metadata.metadata(name)
    said = about.get("License-Expression") or "; ".join(
        kind.split(" :: ")[-1]
        for kind in about.get_all("Classifier", [])
        if kind.startswith("License ::")
    )
    return said or (about.get("License") or "").partition("\n")[0]


def needed_by(name: str, known: set[str]) -> set[str]:
    """All that an installed distribution needs, and itself."""
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return known  # for another platform
    known.add(re.sub(r"[-_.]+", "-", name).lower())
    for requirement in map(Requirement, needs):
        wanted = requirement.marker
        if wanted is None or wanted.evaluate({"extra": ""}):
            plain = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if plain not in known:
                needed_by(plain, known)
    return known


def test_dependencies_may_be_used_for_anything():
    names = needed_by("gcsfs", needed_by("topd_jax", set()))
    assert {"jax", "numpy", "scipy", "transformers"} <= names
    odd = {
        name: licence_of(name)
        for name in sorted(names)
        if not PERMISSIVE.search(licence_of(name))
        or RESTRICTIVE.search(licence_of(name))
    }
    assert not odd


def test_every_dependency_has_a_lower_bound():
    tree = ast.walk(ast.parse((TOP / "setup.py").read_text()))
    (needs,) = (
        ast.literal_eval(node.value)
        for node in tree
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    assert [need for need in needs if ">=" not in need] == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel of the source archive of this checkout is installed."""
    folder = tmp_path_factory.mktemp("supply")
    source = folder / "checkout"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    for name in ("topd_jax", "configs"):
        shutil.copytree(
            TOP / name, source / name, symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip

    def python(*arguments: object, cwd: Path) -> None:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=cwd,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    python("setup.py", "-q", "sdist", "--dist-dir", folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    alone = ("--no-build-isolation", "--no-deps", "--no-index")
    python(*pip, "wheel", *alone, "--wheel-dir", folder, ".", cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    where = folder / "site"
    python(*pip, "install", *alone, "--target", where, wheel, cwd=folder)
    return where


@pytest.mark.slow
def test_a_wheel_of_the_source_archive_trains(installed, tmp_path):
    def topd(*arguments: object) -> str:
        code = "import topd_jax.cli.main as m; print(m.__file__); m.run()"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(installed)},
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.split()[0]).is_relative_to(installed)
        return done.stdout

    assert "Apache" in licence_of("topd_jax")
    assert "learning_rate" in topd("settings", "learning_rate")
    run = ("--config", "tiny", "--workdir", tmp_path / "run")
    printed = topd(
        "train", *run, "--config.train.steps=2", "--config.eval.problems=8",
        "--config.eval.final_problems=8", "--config.train.preflight=False",
        "--config.data.batch_size=8",
    )  # fmt: skip
    assert "exact_match" in printed
    topd("report", "--workdir", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
