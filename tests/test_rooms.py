"""The rooms of the package: imports point downward, and never in a circle."""

import ast
import functools
from pathlib import Path

import topd_jax

PACKAGE = Path(topd_jax.__file__).parent
# From the bottom up: a room imports from those before it.
ROOMS = (
    "settings", "types", "parallel", "models", "sampling", "losses",
    "objectives", "data", "evaluation", "training", "planning", "experiments",
    "cli",
)  # fmt: skip


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if "configs" not in path.parts
    }


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if (name or "").startswith("topd_jax.")}


def room(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_downward():
    known = modules()
    upward = [
        f"{module} imports {other}"
        for module, path in known.items()
        if module.count(".") and module != "topd_jax.__init__"
        for other in imports_of(path, known)
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_modules_import_each_other():
    known = modules()
    graph = {
        module.removesuffix(".__init__"): {
            other for other in imports_of(path, known) if other != module
        }
        for module, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_root_holds_three_modules():
    names = {path.stem for path in PACKAGE.glob("*.py")}
    assert names == {"__init__", "settings", "types"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert {r for r in rooms if r[0] not in "_."} - {"configs"} == set(
        ROOMS
    ) - {"settings", "types"}
    # A public name never hides a room or a module of the root.
    assert not set(topd_jax.__all__) & {*ROOMS, *names}


def test_files_and_functions_are_short():
    long = []
    for path in PACKAGE.rglob("*.py"):
        if (lines := path.read_text().count("\n")) >= 400:
            long.append(f"{path.name}: {lines} lines")
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                size = node.end_lineno - node.lineno - doc.count("\n")
                if size > 60:
                    long.append(f"{path.name}: {node.name} has {size} lines")
    assert not long, "\n".join(long)


def test_nothing_is_unpickled_and_no_shell_is_started():
    """Nor is code run that comes with a model or a dataset."""
    forbidden = ("shell", "allow_pickle", "trust_remote_code")
    for path in PACKAGE.rglob("*.py"):
        nodes = nodes_of(path)
        imported = {
            alias.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not imported & {"pickle", "marshal", "shelve", "torch"}, path
        calls = [n for n in nodes if isinstance(n, ast.Call)]
        called = {ast.unparse(call.func) for call in calls}
        assert not called & {"os.system", "os.popen", "eval", "exec"}, path
        for keyword in (k for call in calls for k in call.keywords):
            if keyword.arg in forbidden:
                assert ast.unparse(keyword.value) == "False", path
