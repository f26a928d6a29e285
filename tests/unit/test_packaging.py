"""Pins, environments and pyproject agree; the scripts parse; imports run one way."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = ("fetch", "prepare", "shards", "sources", "supply", "text", "tokenizer")
LIGHT = (
    "bundle", "campaign", "config", "configfiles", "expansion", "explain", "imported", "jobs", "lease", "logs",
    "mirror", "plan", "provenance", "sections", "waiting", *DATA,
)  # fmt: skip
WITHOUT_TORCH = [f"kdclimb.{name}" for name in LIGHT] + sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "kdclimb/analysis").rglob("*.py")
    if path.stem != "__init__"
)


def pins(lines) -> dict[str, str]:
    """{name: version} of lines that must all be NAME==VERSION, possibly with extras."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{line} is not a pin"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = specifier.version
    return found


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r "))]


def env_lines() -> list[str]:
    (pip,) = [d["pip"] for d in env()["dependencies"] if isinstance(d, dict)]
    return pip


def env() -> dict:
    return yaml.safe_load((ROOT / "envs/kdclimb.yaml").read_text())


def imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("source", ["requirements", "env"])
def test_dependencies_are_pinned_within_their_bounds(source):
    pinned = pins(requirement_lines("requirements.txt") if source == "requirements" else env_lines())
    for line in PYPROJECT["dependencies"]:
        dependency = Requirement(line)
        name = canonicalize_name(dependency.name)
        assert name in pinned, f"{name} of pyproject.toml is not pinned"
        assert dependency.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {dependency.specifier}"


def test_dev_dependencies_are_pinned_within_their_bounds():
    pinned = pins(requirement_lines("requirements-dev.txt"))
    for line in PYPROJECT["optional-dependencies"]["dev"]:
        dependency = Requirement(line)
        assert dependency.specifier.contains(pinned[canonicalize_name(dependency.name)]), line


def test_the_test_packages_only_add():
    both = pins(requirement_lines("requirements.txt")).keys() & pins(requirement_lines("requirements-dev.txt")).keys()
    assert not both, "./test may add to .venv while a ./run works in it, and may not change what is there"


def test_env_and_requirements_pin_the_same():
    assert pins(env_lines()) == pins(requirement_lines("requirements.txt"))
    assert sorted(env_lines()) == sorted(requirement_lines("requirements.txt")), "extras differ"


@pytest.mark.parametrize(("source", "lock"), [("requirements", "locked"), ("requirements-dev", "locked-dev")])
def test_all_pins_but_torch_are_locked_by_hash(source, lock):
    lines = (ROOT / f"envs/{lock}.txt").read_text().replace(" \\\n", "").splitlines()[1:]
    wanted = [line for line in requirement_lines(f"{source}.txt") if not line.startswith("torch==")]
    assert [line.split(" ")[0] for line in lines] == wanted, "make it again: python envs/lock.py"
    for line in lines:
        hashes = line.split()[1:]
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", found) for found in hashes), line


def test_the_citation_names_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PYPROJECT["version"] and cited["cff-version"] == "1.2.0"
    assert (ROOT / "LICENSE").read_text().startswith(f"{cited['license']} License")
    assert all(cited[key] for key in ("message", "title", "authors"))


def test_env_and_pyproject_ask_for_the_same_python():
    (python,) = [d.removeprefix("python").strip() for d in env()["dependencies"] if str(d).startswith("python")]
    assert python == PYPROJECT["requires-python"]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the .venv of ./test")
def test_the_venv_holds_the_pins():
    pinned = pins(requirement_lines("requirements.txt")) | pins(requirement_lines("requirements-dev.txt"))
    installed = {name: version(name).split("+")[0] for name in pinned}
    assert installed == pinned


@pytest.mark.parametrize("script", ["run", "test", ".ci/run", "envs/setup.sh"])
def test_bash_parses_the_scripts(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    executable = bool((ROOT / script).stat().st_mode & 0o100)
    assert executable == (script != "envs/setup.sh")


def test_nothing_in_the_package_imports_snakemake():
    offenders = [
        str(path.relative_to(ROOT)) for path in (ROOT / "kdclimb").rglob("*.py") if "snakemake" in imports(path)
    ]
    assert not offenders


def test_campaign_and_analysis_name_no_torch():
    paths = [ROOT / (module.replace(".", "/") + ".py") for module in WITHOUT_TORCH if module != "kdclimb.provenance"]
    assert not [path.name for path in paths if "torch" in imports(path)]


def test_campaign_and_analysis_load_no_torch():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
