"""One set of dependencies: pyproject.toml declares it, and the lock, environment.yml and the Makefile agree with it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"torch": "pytorch"}
ONLY_PIP = {"sphinx-mathjax-offline"}
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64"), ("win32", "Windows", "AMD64"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, the extras included."""
    extras = project()["optional-dependencies"].values()
    return [Requirement(line) for line in [*project()["dependencies"], *(line for extra in extras for line in extra)]]


def lock_stanzas() -> list[str]:
    """One string per pinned package: its line and the hashes beneath."""
    return re.split(r"\n(?=\S)", read("requirements.lock").strip())


def lock_pins() -> list[Requirement]:
    return [Requirement(stanza.split(" \\")[0]) for stanza in lock_stanzas()]


def test_environment_yml_names_the_same_packages_with_the_same_bounds():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    lines = environment["dependencies"]
    by_pip = next(line["pip"] for line in lines if isinstance(line, dict))
    conda = {found.name: found.specifier for found in map(Requirement, (x for x in lines if isinstance(x, str)))}
    pip = {found.name: found.specifier for found in map(Requirement, (x for x in by_pip if x != "-e ."))}
    assert "-e ." in by_pip, "the package itself"
    assert conda.pop("python") == SpecifierSet(project()["requires-python"])
    conda.pop("pip")
    wanted = {found.name: found.specifier for found in requirements()}
    assert pip == {name: wanted[name] for name in ONLY_PIP}
    assert conda == {CONDA_NAMES.get(n, n): bound for n, bound in wanted.items() if n not in ONLY_PIP}


@pytest.mark.parametrize("wanted", requirements(), ids=lambda wanted: wanted.name)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_dependency_within_its_bounds_on_every_system(wanted, python):
    for sys_platform, system, machine in PLATFORMS:
        place = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": sys_platform,
            "platform_system": system,
            "platform_machine": machine,
        }
        pins = [
            pin
            for pin in lock_pins()
            if canonicalize_name(pin.name) == canonicalize_name(wanted.name)
            and (pin.marker is None or pin.marker.evaluate(place))
        ]
        assert len(pins) == 1, f"{wanted.name} on {system} with Python {python}: run make lock"
        (exact,) = pins[0].specifier
        assert exact.operator == "==" and wanted.specifier.contains(exact.version, prereleases=True), "run make lock"


def test_every_pin_of_the_lock_has_a_hash_and_no_address():
    for stanza in lock_stanzas():
        first, *rest = stanza.split("\n")
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==\S+( ; .+)? \\", first), first
        assert rest and all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in rest), first


def test_the_versions_of_python_agree():
    bounds = SpecifierSet(project()["requires-python"])
    allowed = [f"3.{minor}" for minor in range(9, 20) if f"3.{minor}" in bounds]
    assert allowed == list(PYTHONS)
    prefix = "Programming Language :: Python :: 3."
    classified = [line.removeprefix(prefix) for line in project().get("classifiers", []) if line.startswith(prefix)]
    assert classified in ([], [python.removeprefix("3.") for python in PYTHONS])
    makefile = read("Makefile")
    low, high = re.search(r"\((3, \d+)\) <= sys\.version_info\[:2\] <= \((3, \d+)\)", makefile).groups()
    assert (low.replace(", ", "."), high.replace(", ", ".")) == (PYTHONS[0], PYTHONS[-1])
    oldest = tomllib.loads(read("pyproject.toml"))["tool"]["ruff"]["target-version"]
    assert oldest == "py" + PYTHONS[0].replace(".", "")


def test_what_the_runner_and_these_tests_import_is_pinned():
    """They come in with jupyterlab and papermill, and nothing in pyproject.toml names them."""
    assert {"nbformat", "packaging", "pyyaml"} <= {pin.name for pin in lock_pins()}


@pytest.mark.skipif(shutil.which("awk") is None, reason="awk is what the Makefile calls")
def test_the_makefile_extracts_uv_with_its_hashes_and_nothing_else():
    (command,) = re.findall(r"awk .* requirements\.lock(?= >)", read("Makefile"))
    done = subprocess.run(command.replace("$$", "$"), shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [done.stdout.rstrip("\n")] == [stanza for stanza in lock_stanzas() if stanza.startswith("uv==")]


makes = pytest.mark.skipif(
    sys.platform == "win32" or not (shutil.which("make") and shutil.which("awk")), reason="make and awk are needed"
)
SAYS_WHAT_IT_IS_ASKED = """#!/bin/sh
echo "$@" >> uv.log
case "$*" in *"$FAILS") exit 1 ;; esac
"""


def make(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """Run the course's Makefile in ``folder``; pip and uv know only what ``env`` tells them."""
    shutil.copy(ROOT / "Makefile", folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "MAKE", "PYTHON"))}
    env = {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "FAILS": "nothing", **env}
    command = ["make", f"PYTHON={getattr(sys, '_base_executable', sys.executable)}", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def tiny_course(tmp_path) -> Path:
    """A folder whose lock pins one package: a uv that writes down what it is asked; its wheel lies in source/."""
    wheel = tmp_path / "source" / "uv-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        script = zipfile.ZipInfo("uv-1.0.data/scripts/uv")
        script.external_attr = 0o100755 << 16  # a file that may be executed
        archive.writestr(script, SAYS_WHAT_IT_IS_ASKED)
        archive.writestr("uv-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 1.0\n")
        archive.writestr("uv-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("uv-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "requirements.lock").write_text(f"uv==1.0 \\\n    --hash=sha256:{digest}\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


@makes
def test_a_wheelhouse_is_whole_or_not_there_and_then_takes_the_place_of_the_network(tiny_course):
    source, wheelhouse, uv = (tiny_course / name for name in ("source", "wheelhouse", ".venv/bin/uv"))
    assert "downloads" in make(tiny_course, ".venv/.uv", PIP_FIND_LINKS=str(source)).stdout
    assert os.access(uv, os.X_OK)
    done = make(tiny_course, "wheelhouse")
    assert done.returncode != 0 and not wheelhouse.exists(), "the wheel is nowhere to be had"
    done = make(tiny_course, "wheelhouse", PIP_FIND_LINKS=str(source))
    assert done.returncode == 0 and "wheelhouse/ is complete" in done.stdout, done.stderr
    assert not (tiny_course / "wheelhouse.part").exists()
    (wheel,) = wheelhouse.iterdir()
    content = wheel.read_bytes()

    uv.unlink()
    (tiny_course / ".venv" / ".uv").unlink()
    wheel.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    done = make(tiny_course, ".venv/.ready")
    assert done.returncode != 0 and "make wheelhouse" in done.stderr and not uv.exists(), "one bit is flipped"
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in done.stderr and "downloads" not in done.stdout

    wheel.write_bytes(content)
    done = make(tiny_course, ".venv/.ready", FAILS="requirements.lock")
    assert done.returncode != 0 and "make wheelhouse" in done.stderr and uv.exists()
    assert not (tiny_course / ".venv" / ".ready").exists()
    assert make(tiny_course, ".venv/.ready").returncode == 0
    first, again, course = (tiny_course / "uv.log").read_text(encoding="utf-8").splitlines()
    assert all("--no-index --find-links wheelhouse --require-hashes -r" in asked for asked in (first, again))
    assert "--reinstall" in again and "-e ." in course


@makes
def test_the_audit_looks_up_every_pin_and_fails_if_one_of_them_fails(tmp_path):
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    uv = tmp_path / ".venv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(SAYS_WHAT_IT_IS_ASKED, encoding="utf-8")
    uv.chmod(0o755)
    (tmp_path / ".venv" / ".uv").touch()

    assert make(tmp_path, "audit").returncode == 0
    done = make(tmp_path, "audit", FAILS="/2.txt")
    assert done.returncode != 0 and "could not be looked up" in done.stderr
    lists = sorted((tmp_path / "build" / "audit").iterdir())
    asked = (tmp_path / "uv.log").read_text(encoding="utf-8").splitlines()
    assert len(lists) > 1 and len(asked) == 2 * len(lists), "one failure does not hide the others"
    assert all("--strict" in line for line in asked), "else what could not be looked up would pass"

    looked_up = []
    for path in lists:
        stanzas = re.split(r"\n(?=\S)", path.read_text(encoding="utf-8").strip())
        names = [stanza.split("==")[0] for stanza in stanzas]
        assert len(names) == len(set(names)), path.name
        looked_up += stanzas
    assert sorted(looked_up) == sorted(re.sub(r" ;.*", r" \\", stanza, count=1) for stanza in lock_stanzas())


def our_files() -> list[Path]:
    """The files of the repository, those not yet committed included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    ours = ("aigc_course", "notebooks", "tests", "data", "benchmarks", ".ci")
    files = [path for folder in ours for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in [*files, *ROOT.glob("*.*"), ROOT / "Makefile", ROOT / "LICENSE"] if path.is_file()]


def test_no_file_names_a_path_of_somebodys_machine_or_a_package_host():
    places = r"(?<![\w.~$}])/(?:home|Users|root|work)/[\w.-]+|[A-Z]:\\+Users\\"
    hosts = r"pypi\.(?:org|python)|files\.python" + "hosted"
    pattern = re.compile(f"{places}|{hosts}")
    assert pattern.search("see /" + "home/ada/x") and pattern.search("https://py" + "pi.org/simple"), "it must bite"
    found, read_files = [], 0
    for path in our_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture, an archive
            continue
        read_files += 1
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert read_files > 10 and not found
