"""Importing EasyEdit where its own imports would fail, and registering KDPO with it once it is there.

Two things are called EasyEdit: the GitHub repository's main branch ("main"), and ``easyeditor`` 0.0.1.dev0, its only
release on PyPI ("the release"). :func:`install` puts a finder before Python's own, which takes a hand in one import alone:
``import easyeditor``, whoever asks for it. Where EasyEdit's imports simply succeed, nothing else here runs.
"""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .devices import device_name

HOW_TO_GET_IT = (
    "EasyEdit is not here. Two ways to get it: `pip install --no-deps easyeditor==0.0.1.dev0`, or "
    "`git clone https://github.com/zjunlp/EasyEdit` with EASYEDIT_HOME set to the clone."
)


def install() -> None:
    """From now on, whoever imports ``easyeditor`` gets it with KDPO registered; at once where it is imported already.

    Doing it again changes nothing.
    """
    if "easyeditor" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def import_easyedit() -> ModuleType:
    """The ``easyeditor`` module: the one imported already, the clone that ``EASYEDIT_HOME`` names, or the installed one.

    Raises:
        ImportError: there is none, or ``EASYEDIT_HOME`` names no clone.
    """
    install()
    if "easyeditor" not in sys.modules and importlib.util.find_spec("easyeditor") is None:
        raise ImportError(HOW_TO_GET_IT)
    return importlib.import_module("easyeditor")


def is_release() -> bool:
    """Whether the host is the release, which lacks main's module for devices."""
    spec = importlib.util.find_spec("easyeditor")
    return not (Path(spec.origin).parent / "util" / "device.py").is_file()  # type: ignore[union-attr,arg-type]


def is_easyedit(module_name: str) -> bool:
    """Whether a module is one of EasyEdit's."""
    return module_name.partition(".")[0] == "easyeditor"


def _register() -> None:
    importlib.import_module(f"{__package__}.easyedit")  # does it when it is imported


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``easyeditor``; and its modules too, once its own imports have failed.

    Attributes:
        stands_in: whether they have.
    """

    stands_in = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not is_easyedit(fullname) or (fullname != "easyeditor" and not self.stands_in):
            return None
        if fullname == "easyeditor" and (home := os.environ.get("EASYEDIT_HOME")):
            path = [str(Path(home).resolve())]
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None and fullname == "easyeditor" and path:
            raise ImportError(f"EASYEDIT_HOME is {home!r}, which has no easyeditor/ in it. {HOW_TO_GET_IT}")
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            if fullname == "easyeditor":
                spec.loader = _PackageLoader(spec.loader.name, spec.loader.path, self)
            else:
                spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


@contextmanager
def _globals_kept() -> Iterator[None]:
    """For a block: what EasyEdit sets for the whole process when it is imported is put back.

    It seeds all generators, hangs a handler on the root logger, and has CUDA wait for every kernel.
    """
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    blocking, root = os.environ.get("CUDA_LAUNCH_BLOCKING"), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)
        root.handlers[:] = handlers
        root.setLevel(level)
        os.environ.pop("CUDA_LAUNCH_BLOCKING", None)
        if blocking is not None:
            os.environ["CUDA_LAUNCH_BLOCKING"] = blocking


# --------------------------------------------------------------------------------------------------------------------
# Where packages are absent, each of EasyEdit's modules is given an `import` of its own, and a stand-in for an absent
# package goes to that module alone, never into sys.modules: transformers probes for the same packages, and must keep
# hearing that they are not there.


class _StandIn(type):
    """What EasyEdit gets for an absent package and its names: to subclass, annotate and decorate with, not to call."""

    _path: str
    _remedy: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(f"{cls._path}.{name}", cls._remedy)

    def __getitem__(cls, item: Any) -> Any:  # in an annotation: Optional[item]
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):  # as a decorator
            return args[0]
        raise ImportError(f"{cls._path} is not here: {cls._remedy}")


def stand_in(path: str, remedy: str) -> _StandIn:
    """What stands for something absent; calling it for real is an ImportError with the remedy."""
    return _StandIn(path.rpartition(".")[2], (), {"_path": path, "_remedy": remedy})


# The release's image models import names that transformers has dropped.
_DROPPED = "easyeditor.trainer.blip2_models"


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """``__import__`` as EasyEdit's modules see it."""
    absolute = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
    if is_release() and f"{absolute}.".startswith(_DROPPED + "."):
        return stand_in(absolute, "EasyEdit's release needs transformers 4.30 for images")
    try:
        return builtins.__import__(name, globals, locals, fromlist, level)
    except ModuleNotFoundError as error:
        package = absolute.partition(".")[0]
        absent = level == 0 and (error.name or "").partition(".")[0] == package
        if not absent or package == "easyeditor" or importlib.util.find_spec(package) is not None:
            raise
        return stand_in(absolute if fromlist else package, f"install the package {package}")


class _NoHardCodedCuda(ast.NodeTransformer):
    """``f"cuda:{x}"`` → ``_device(x)``."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        match node.values:
            case [ast.Constant(value="cuda:"), ast.FormattedValue(value=value)]:
                return ast.copy_location(ast.Call(ast.Name("_device", ast.Load()), [value], []), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one of EasyEdit's modules with stand-ins."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import, "_device": device_name}
        super().exec_module(module)

    def get_code(self, fullname: str) -> Any:
        if not is_release():
            return super().get_code(fullname)
        path = self.get_filename(fullname)
        tree = _NoHardCodedCuda().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _PackageLoader(importlib.machinery.SourceFileLoader):
    """Loads EasyEdit: as it is, or else with stand-ins; and registers KDPO."""

    def __init__(self, name: str, path: str, finder: _Finder) -> None:
        super().__init__(name, path)
        self.finder = finder

    def exec_module(self, module: ModuleType) -> None:
        with _globals_kept():
            try:
                super().exec_module(module)
            except ImportError:  # of a package that is not here, or of a name that a newer one has dropped
                for name in [n for n in sys.modules if n.startswith("easyeditor.")]:
                    del sys.modules[name]
                self.finder.stands_in = True
                _Loader(self.name, self.path).exec_module(module)
        _register()
