"""A method's search space: which hyper-parameters are chosen, from what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..method.config import HParamsError, read_yaml, yaml_folder

_FOLDER = Path(__file__).parent / "spaces"
# A second parameter of Optuna's for one hyper-parameter: how many layers.
_NUMBER = ".number"


class Suggests(Protocol):
    """What chooses: a trial of Optuna's."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number, both ends included."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of several."""


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included; whole ones where both are."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Suggests, name: str) -> float:
        """A number, of three digits, so that a YAML can be read."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        value = float(f"{trial.suggest_float(name, self.low, self.high, log=self.log):.3g}")
        return min(max(value, self.low), self.high)

    def around(self, value: Any) -> Range:
        """This range, made wider where it does not hold a value."""
        return Range(min(self.low, value), max(self.high, value), self.log)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Suggests, name: str) -> Any:
        """One of them."""
        return trial.suggest_categorical(name, self.values)

    def around(self, value: Any) -> Choices:
        """These, and a value that is not among them."""
        return self if value in self.values else Choices((*self.values, value))

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


def read_space(method: str) -> dict[str, Any]:
    """A method's search space as its file has it.

    Raises:
        HParamsError: there is no such file.
    """
    return read_yaml(_file_of(method))


def _file_of(method: str) -> Path:
    path = _FOLDER / f"{yaml_folder(method)}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise HParamsError(f"{method} has no search space; those that have one: {names}")
    return path


class Space:
    """A method's search space on one model, made wider where its present settings lie outside.

    Args:
        method: the name that its file in ``spaces/`` has.
        hparams: the present settings.
        depth: how many layers the model has.

    Raises:
        HParamsError: there is no such file; it names what the hyper-parameters do not have, or hold in another form; or a
            present setting has no logarithm to be searched by.
    """

    def __init__(self, method: str, hparams: Any, depth: int) -> None:
        path = _file_of(method)
        self.depth = depth
        self.hparams = hparams
        self.parameters: dict[str, Range | Choices] = {}
        self.present: dict[str, Any] = {}
        for name, of in read_space(method).items():
            if not hasattr(hparams, name):
                raise HParamsError(f"{path}: names {name!r}, which the hyper-parameters of {method} here do not have")
            for parameter, values, present in self._parameters(path, name, of):
                if isinstance(values, Range) and values.log and not (present or 0) > 0:
                    raise HParamsError(
                        f"{name} is {present!r}; allowed where {method} is tuned: a number above 0, as it is searched by its "
                        f"logarithm; begin with one from {values.low:g} to {values.high:g} in the YAML"
                    )
                self.parameters[parameter], self.present[parameter] = values.around(present), present

    def _parameters(self, path: Path, name: str, of: Any) -> list[tuple[str, Range | Choices, Any]]:
        """What Optuna chooses for a hyper-parameter, and what it is now."""
        value = getattr(self.hparams, name)
        keys = of.keys() if isinstance(of, dict) else set()
        if {"from", "to"} <= keys <= {"from", "to", "log"}:
            if isinstance(value, list):  # EAMET's weights, a layer each: what is chosen is every layer's
                if len(set(value)) != 1:
                    raise HParamsError(f"{name} is {value!r}; allowed where {path.stem} is tuned: the same for every layer")
                value = value[0]
            return [(name, Range(of["from"], of["to"], of.get("log", False)), value)]
        if keys == {"choices"}:
            return [(name, Choices(tuple(of["choices"])), value)]
        if {"depth"} <= keys <= {"depth", "number"}:
            low, high = (round(share * (self.depth - 1)) for share in of["depth"])
            layers = value if name == "layers" else _layers_of(value)
            found: list[tuple[str, Range | Choices, Any]] = [(name, Range(low, high), min(layers))]
            if "number" in of:
                found.append((name + _NUMBER, Range(*of["number"]), len(layers)))
            return found
        raise HParamsError(
            f"{path}: {name} is {of!r}; allowed: {{from: …, to: …, log: true}}, {{choices: […]}}, or of layers {{depth: "
            "[share, share], number: [one, several]}"
        )

    def settings(self, trial: Suggests) -> dict[str, Any]:
        """Hyper-parameters as a trial chooses them, to go in the place of the present ones."""
        chosen: dict[str, Any] = {name: values.suggest(trial, name) for name, values in self.parameters.items()}
        for name in {"layers", "inner_params"} & chosen.keys():
            first, number = chosen[name], chosen.pop(name + _NUMBER, 1)
            layers = list(range(first, min(first + number, self.depth)))
            chosen[name] = layers if name == "layers" else [_at(self.hparams.inner_params[0], layer) for layer in layers]
        return chosen

    def words(self) -> dict[str, str]:
        """The space as a person reads it."""
        return {name.replace(_NUMBER, ", how many"): str(values) for name, values in self.parameters.items()}


_LAYER = re.compile(r"(?<=[.\[])\d+(?=[.\]])")


def _layers_of(names: list[str]) -> list[int]:
    """The layers in names such as ``model.layers[3].mlp.down_proj.weight``."""
    layers = [int(found[0]) for name in names if (found := _LAYER.search(name))]
    if not layers or names != [_at(names[0], layer) for layer in range(layers[0], layers[0] + len(names))]:
        raise HParamsError(f"inner_params is {names!r}; allowed for a search: one module, of consecutive layers")
    return layers


def _at(name: str, layer: int) -> str:
    """A module's name at another layer."""
    return _LAYER.sub(str(layer), name, count=1)
