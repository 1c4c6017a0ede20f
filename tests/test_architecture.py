"""The house stays simple: four floors, imports downward only, small modules."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "aigc_course"
FLOORS = [
    {"runtime", "datasets", "tokenizer", "state", "checkpoints"},
    {"gmm", "vae", "gan", "unet", "diffusion", "gpt2", "generate", "classifier"},
    {"training", "metrics", "plots", "widgets"},
    {"recipes", "experiments", "lessons", "exercises", "course", "pages", "doctor", "cli"},
]
# On one floor everyone may use runtime, and these pairs are allowed.
SIDEWAYS = {
    ("diffusion", "unet"),
    ("generate", "gpt2"),
    ("widgets", "plots"),
    ("lessons", "recipes"),
    ("experiments", "recipes"),
    ("course", "pages"),
    *(("cli", name) for name in FLOORS[3]),
}
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module in names)


def imports_of(path: Path) -> set[str]:
    """The modules of this package that ``path`` imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("aigc_course")):
            inside = (node.module or "").removeprefix("aigc_course").strip(".")
            found |= {inside.split(".")[0]} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("aigc_course.")}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    for name in imports_of(path):
        down = floor(name) < floor(path.stem)
        assert down or name == "runtime" or (path.stem, name) in SIDEWAYS, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_families_know_no_data_and_no_loop(path):
    if floor(path.stem) == 1:
        assert not imports_of(path) & {"datasets", "training", "plots"}
    if path.stem == "plots":
        assert all(floor(name) == 0 for name in imports_of(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_fits_in_a_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_torchvision_is_imported_lazily(path):
    """Importing it costs seconds in every kernel, also in those that do without."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert not any(name.startswith("torchvision") for name in names)


def test_nothing_reseeds_the_global_generator_but_the_loop():
    """The loop seeds it inside a fork, for dropout; anyone else would change other people's numbers."""
    for path in MODULES:
        called = {n.func.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                  if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                  and isinstance(n.func.value, ast.Name) and n.func.value.id == "torch"}  # fmt: skip
        assert "manual_seed" not in called or path.stem == "training", path.stem
