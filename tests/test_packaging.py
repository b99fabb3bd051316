"""What is installed, and that it is clean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_a_wheel_carries_every_yaml_and_the_reports_template(wheel):
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    provided = {f"kdpo_easyedit/hparams_yaml/{p.relative_to(ROOT / 'hparams')}" for p in (ROOT / "hparams").rglob("*.yaml")}
    spaces = {str(p.relative_to(ROOT)) for p in (ROOT / "kdpo_easyedit" / "sweep" / "spaces").glob("*.yaml")}
    assert carried == provided | spaces and len(provided) > 50 and len(spaces) == 19
    assert "kdpo_easyedit/report/report.html" in zipfile.ZipFile(wheel).namelist()


def test_provided_yamls_are_found_by_name_from_any_folder(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import kdpo_easyedit; print(kdpo_easyedit.__file__);"
        "h = kdpo_easyedit.KDPOHyperParams.from_hparams('qwen1.5-0.5b'); print(h.model_name, h.layers)"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = python("-c", code, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "kdpo_easyedit" / "__init__.py"), "Qwen/Qwen1.5-0.5B", "[21]"]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_code_is_clean(command):
    done = python("-m", *command, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


#: docs/architecture.md: what stands to the left knows nothing of what stands to the right of it.
ORDER = ("method", "models", "edits", "easyedit", "bench", "report", "sweep", "cli")


def test_imports_point_down():
    found = []
    for place, folder in enumerate(ORDER):
        above = "|".join(ORDER[place + 1 :])
        for file in (ROOT / "kdpo_easyedit" / folder).glob("*.py"):
            found += re.findall(rf"^ *from \.\.(?:{above or 'nothing'})\b.*", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found == []
