"""What a newcomer finds beside the code agrees with the package: versions, workflow, citation, changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import nsa

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lower_bounds() -> dict[str, str]:
    """Least version of each requirement."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in ("hf", "dev") for line in extras[name])]
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    oldest, least = pins("constraints-oldest.txt"), lower_bounds()
    assert {"torch", "triton", "transformers"} <= set(oldest)
    for name, version in oldest.items():
        assert version.removesuffix(".0") == least[name].removesuffix(".0"), name


def test_the_workflow_tests_oldest_and_newest_on_the_first_and_last_python() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert matrix["python"] == [pythons[0], pythons[-1]]
    constraints = {entry["versions"]: entry["constraints"] for entry in matrix["include"]}
    assert constraints == {"oldest": "constraints-oldest.txt", "newest": "", "pinned": "constraints.txt"}
    assert set(matrix["versions"]) == {"oldest", "newest"}
    assert any("make test" in step.get("run", "") and "matrix.constraints" in step["run"] for step in job["steps"])


def test_forms_ask_for_something_each() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "feature", "performance"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.stem != "config":
            assert {"name", "description", "body"} <= set(content)
            assert any(field.get("validations", {}).get("required") for field in content["body"])
            assert len({field["id"] for field in content["body"]}) == len(content["body"])


def test_citation_and_changelog_know_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nsa.__version__ == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert "2502.11089" in citation["references"][0]["url"]
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
