"""One list of dependencies, in pyproject.toml; the other files agree with it."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
DEPENDENCIES = ENVIRONMENT["dependencies"]


def read_constraints():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def named():
    """Every requirement of pyproject.toml, but the project itself."""
    lists = [PYPROJECT["build-system"]["requires"], PROJECT["dependencies"]]
    for line in (line for part in (*lists, *EXTRAS.values()) for line in part):
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) != PROJECT["name"]:
            yield requirement


def pip_lines():
    """The options of environment.yml's pip part: option to argument."""
    (pip,) = (d["pip"] for d in DEPENDENCIES if isinstance(d, dict))
    found = {}
    for line in pip:
        option, _, argument = line.partition(" ")
        option = {"-e": "--editable", "-c": "--constraint"}.get(option, option)
        found[option] = argument.strip()
    return found


def test_conda_installs_a_python_that_the_project_supports():
    (line,) = (d for d in DEPENDENCIES if str(d).startswith("python"))
    version = line.partition("=")[2].strip("=")
    assert Version(version) in SpecifierSet(PROJECT["requires-python"])
    assert version == PYPROJECT["tool"]["pyright"]["pythonVersion"]
    assert "pip" in DEPENDENCIES


def test_conda_needs_one_channel_and_has_the_projects_name():
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert ENVIRONMENT["name"] == PROJECT["name"]


def test_conda_installs_the_project_with_extras_that_exist():
    lines = pip_lines()
    assert lines.keys() == {"--editable", "--constraint"}
    assert (ROOT / lines["--constraint"]).is_file()
    found = re.fullmatch(r"\.\[([\w,-]+)\]", lines["--editable"])
    assert set(found[1].split(",")) <= EXTRAS.keys()
    assert {"notebooks", "book", "test", "edge"} <= set(found[1].split(","))


def test_an_extra_names_only_extras_that_exist():
    for line in (line for extra in EXTRAS.values() for line in extra):
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            assert requirement.extras <= EXTRAS.keys()


def test_constraints_pin_each_package_once():
    pins = read_constraints()
    assert len({canonicalize_name(pin.name) for pin in pins}) == len(pins)
    for pin in pins:
        assert [s.operator for s in pin.specifier] == ["=="], pin


@pytest.mark.parametrize("requirement", list(named()), ids=str)
def test_each_dependency_is_pinned_within_its_range(requirement):
    pins = {canonicalize_name(pin.name): pin for pin in read_constraints()}
    pin = pins[canonicalize_name(requirement.name)]
    (pinned,) = pin.specifier
    assert Version(pinned.version) in requirement.specifier
