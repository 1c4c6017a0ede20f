"""The house stays simple: four floors, imports downward only, small modules."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "aigc_course"
FLOORS = [
    {"runtime", "datasets", "tokenizer", "linear", "ranks", "state", "checkpoints"},
    {"gmm", "vae", "gan", "unet", "diffusion", "ngram", "gpt2", "generate", "classifier"},
    {"training", "metrics", "plots", "widgets"},
    {"recipes", "experiments", "lessons", "exercises", "classroom", "course", "pages", "doctor", "cli"},
]
# On one floor everyone may use runtime, and these pairs are allowed.
SIDEWAYS = {
    ("tokenizer", "datasets"),
    ("state", "ranks"),
    ("diffusion", "unet"),
    ("generate", "gpt2"),
    ("widgets", "plots"),
    ("lessons", "recipes"),
    ("experiments", "recipes"),
    ("course", "pages"),
    *(("classroom", name) for name in ("course", "exercises", "pages")),
    *(("cli", name) for name in FLOORS[3]),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def module_of(path: Path) -> str:
    """The module that a file belongs to: a folder is one module, whatever its files are called."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = {module_of(path) for path in FILES}


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module in names)


def modules_in(source: str, path: Path) -> set[str]:
    """The other modules of this package that ``source``, as the content of ``path``, imports anywhere in it."""
    here = ("aigc_course", *path.relative_to(PACKAGE).parts[:-1])
    targets = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else ()
            module = node.module.split(".") if node.module else []
            targets += [[*base, *module, alias.name] for alias in node.names]
    found = {target[1] for target in targets if target[0] == "aigc_course" and len(target) > 1}
    return found & MODULES - {module_of(path)}


def imports_of(path: Path) -> set[str]:
    return modules_in(path.read_text(encoding="utf-8"), path)


@pytest.mark.parametrize(
    ("file", "source", "modules"),
    [
        ("plots.py", "from . import gmm, vae as v", {"gmm", "vae"}),
        ("plots.py", "from .datasets.mnist import Images", {"datasets"}),
        ("plots.py", "import torch, aigc_course.gmm as g", {"gmm"}),
        ("plots.py", "from aigc_course.gmm import e_step", {"gmm"}),
        ("plots.py", "from aigc_course import gmm, __version__", {"gmm"}),
        ("plots.py", "from gmm import x; from aigc_course_2.vae import y", set()),
        ("plots.py", "def lazy():\n    from .gmm import e_step", {"gmm"}),
        ("recipes/__init__.py", "from .gmm import build; from . import vae", set()),
        ("recipes/__init__.py", "from ..gmm import GaussianMixture", {"gmm"}),
        ("recipes/gmm.py", "from ..gmm import GaussianMixture; from .. import runtime, vae", {"gmm", "runtime", "vae"}),
        ("recipes/gmm.py", "from ..datasets.mnist import Images; from ..recipes import build", {"datasets"}),
        ("recipes/gmm.py", "from . import training; from .plots import x; import aigc_course.recipes.vae", set()),
        ("recipes/deep/gmm.py", "from ..plots import x; from ...plots import y", {"plots"}),
    ],
)
def test_imports_are_resolved(file, source, modules):
    """Inside a folder one dot stays in it and two lead to the package; a file there may share a module's name."""
    assert modules_in(source, PACKAGE / file) == modules


@each_file
def test_imports_point_down(path):
    module = module_of(path)
    for name in imports_of(path):
        down = floor(name) < floor(module)
        assert down or name == "runtime" or (module, name) in SIDEWAYS, f"{module} imports {name}"


@each_file
def test_families_know_no_data_and_no_loop(path):
    if floor(module_of(path)) == 1:
        assert not imports_of(path) & {"datasets", "training", "plots"}
    if module_of(path) == "plots":
        assert all(floor(name) == 0 for name in imports_of(path))


@each_file
def test_a_file_fits_in_a_sitting(path):
    limit = 650 if path.match("exercises/lesson*.py") else 400  # half of those lines are sentences for the reader
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@each_file
def test_torchvision_is_imported_lazily(path):
    """Importing it costs seconds in every kernel, also in those that do without."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert not any(name.startswith("torchvision") for name in names)


def test_nothing_reseeds_the_global_generator_but_the_loop():
    """The loop seeds it inside a fork, for dropout; anyone else would change other people's numbers."""
    for path in FILES:
        called = {n.func.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                  if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                  and isinstance(n.func.value, ast.Name) and n.func.value.id == "torch"}  # fmt: skip
        assert "manual_seed" not in called or module_of(path) == "training", path
