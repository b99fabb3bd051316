"""A sweep's YAML → its cells, with their hyper-parameters, checked before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from ..bench.datasets import load_requests, read_passages
from ..bench.inputs import Inputs, check_edits, need_subject, read_inputs
from ..bench.measuring import Measuring
from ..bench.protocols import Method, check_batches, left_out
from ..bench.schema import SEQUENTIAL, SINGLE, Cell, in_batches
from ..devices import DTYPES, device_name
from ..easyedit.host import HostError
from ..easyedit.hparams import load_hparams, run_as
from ..easyedit.loading import check_device, loading
from ..easyedit.methods import check_method
from ..method.asking import CONTEXTS
from ..method.config import HParamsError, read_yaml
from .tasks import Resources

#: The name of the edits that come with a model.
OWN = "own"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class SweepError(ValueError):
    """A sweep that cannot be made; the message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Data:
    """A file of edits; None for those that come with the model."""

    file: str | None
    datatype: str | None = None


@dataclass
class Plan:
    """A sweep as its YAML has it.

    Attributes:
        cells: what is to be run, those of a model together.
        hparams: of each cell, by its name.
        refused: why a cell cannot be run here, by its name.
        data: by name.
        resources: what a cell asks of a cluster, by its model's short name.
        how: how all are measured.
        eval_at: after how many sequential edits to measure; None: powers of ten, and the end.
        shuffle: whether records are taken in random order, by the seed.
        stats_text, ability_text: files, as ``kdpo compare`` takes them.
    """

    cells: list[Cell]
    data: dict[str, Data]
    how: Measuring = Measuring()
    eval_at: list[int] | None = None
    shuffle: bool = False
    stats_text: str | None = None
    ability_text: str | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    resources: dict[str, Resources] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load = cache(load_requests)
        self._inputs: dict[tuple[Any, ...], Inputs] = {}

    def inputs(self, cell: Cell) -> Inputs:
        """A cell's edits and text. Where they come with a world, that is built.

        Raises:
            DatasetError: as :func:`kdpo_easyedit.bench.inputs.read_inputs`.
            HostError: there are fewer than a batch of the cell's has.
        """
        model_name = self.hparams[cell.name].model_name
        key = (cell.model, model_name, cell.data, cell.size, cell.seed if self.shuffle else None)
        if key not in self._inputs:
            self._inputs[key] = read_inputs(
                cell.model,
                model_name,
                *self._edits(cell),
                stats_text=self.stats_text,
                ability_text=self.ability_text,
                load=self._load,
            )
        check_batches([cell.protocol], len(self._inputs[key].requests))
        return self._inputs[key]

    def check_files(self) -> None:
        """Read the user's files.

        Raises:
            DatasetError: one cannot be read, or has too few edits.
            HostError: one has fewer than a batch.
        """
        for cell in self.cells:
            check_edits(cell.model, self.data[cell.data].file)
            if self.data[cell.data].file:
                check_batches([cell.protocol], len(self._load(*self._edits(cell))))
        for file in filter(None, (self.stats_text, self.ability_text)):
            read_passages(file)

    def _edits(self, cell: Cell) -> tuple[str | None, str | None, int | None, int | None, bool]:
        data = self.data[cell.data]
        # All methods of a sweep are measured on the same edits.
        subjects = need_subject(self.hparams.values())
        return data.file, data.datatype, cell.size, cell.seed if self.shuffle else None, subjects


def read_plan(path: Path, device: str | None = None) -> Plan:
    """Read a sweep's YAML.

    Args:
        device: of all cells, in the place of the YAML's.

    Raises:
        SweepError: a key that is unknown, missing or holds what it cannot hold.
        DatasetError, HostError: as :meth:`Plan.check_files`.
    """
    try:
        config = read_yaml(path)
    except (HParamsError, OSError) as error:
        raise SweepError(f"{path}: {error}") from None
    try:
        return _plan(config, path.parent, device)
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from None


_KEYS = (
    "models", "methods", "data", "protocols", "sizes", "seeds", "orders", "overrides", "exclude", "device", "dtype", "num_gpus",
    "num_cpus", "memory", "metrics", "context", "no_fluency", "eval_at", "shuffle", "stats_text", "ability_text",
)  # fmt: skip


def _plan(config: Mapping[str, Any], folder: Path, device: str | None) -> Plan:
    if unknown := next((key for key in config if key not in _KEYS), None):
        raise SweepError(f"unknown key {unknown!r}; allowed: {', '.join(_KEYS)}")
    models = _list(config, "models", _text)
    methods = _list(config, "methods", _text)
    data = _data(config.get("data"), folder)
    plan = Plan(
        cells=[],
        data=data,
        how=Measuring(
            _one_of(config, "metrics", ("batched", "easyedit"), "batched"),
            tuple(_list(config, "context", _among(*CONTEXTS), ["plain"], empty=True)),
            not _flag(config, "no_fluency"),
        ),
        eval_at=_list(config, "eval_at", _count, [], empty=True) or None,
        shuffle=_flag(config, "shuffle"),
        stats_text=_file(config, "stats_text", folder),
        ability_text=_file(config, "ability_text", folder),
    )
    protocols = _list(config, "protocols", _protocol, [SINGLE])
    orders = _list(config, "orders", _count, [1])
    if orders != [1] and SEQUENTIAL not in protocols:
        raise SweepError(f"orders is {orders}, and single edits have no order; add sequential to protocols")
    overrides = _overrides(config.get("overrides"), methods)
    ways = [(protocol, order) for protocol in protocols for order in (orders if protocol == SEQUENTIAL else [1])]
    sizes = _list(config, "sizes", _size, ["all"])
    seeds = _list(config, "seeds", _whole, [0])
    cells = [
        Cell(model, method, its_data, protocol, size, seed, order, changes)
        for model, its_data, size, seed, (protocol, order), method in product(models, data, sizes, seeds, ways, methods)
        for changes in overrides[method]
    ]
    named: dict[str, Cell] = {}
    for cell in cells:
        if (other := named.setdefault(cell.name, cell)) is not cell:
            both = {"models": (other.model, cell.model), "data": (other.data, cell.data)}
            key = next((key for key, (one, another) in both.items() if one != another), "overrides")
            one, another = both.get(key, (other.overrides, cell.overrides))
            raise SweepError(
                f"{key} names {one!r} and {another!r}, whose runs would share the folder {cell.name}; "
                "give names or values that differ in ASCII letters or digits"
            )
    plan.cells = _without(cells, config.get("exclude"))
    if not plan.cells:
        raise SweepError("exclude leaves no cell; name fewer")
    _load_all(plan, device or _one(config, "device", _text), _one(config, "dtype", _among(*DTYPES)))
    for key in ("num_gpus", "num_cpus", "memory"):
        value = config.get(key)
        if isinstance(value, dict) and (others := [name for name in value if name not in models]):
            raise SweepError(f"{key} names {others[0]!r}; allowed: a model of models")
    for model in dict.fromkeys(cell.model for cell in plan.cells):
        plan.resources[model] = _resources(config, model, [plan.hparams[c.name] for c in plan.cells if c.name in plan.hparams])
    plan.check_files()
    return plan


def check_devices(plan: Plan, here: bool) -> None:
    """Whether the cells' devices can be had: by this machine, or on a cluster.

    Raises:
        HostError, SweepError: they cannot.
    """
    for device in {str(hparams.device): hparams.device for hparams in plan.hparams.values()}.values():
        if here:
            check_device(device)
        elif re.fullmatch(r"cuda:[1-9].*", device_name(device)):
            raise SweepError(f"device is {device!r}; allowed on a cluster: cuda, where Ray gives a cell GPUs of its own")


def _load_all(plan: Plan, device: str | None, dtype: str | None) -> None:
    """Every cell's hyper-parameters, or why it cannot be run."""

    @cache
    def hparams_of(method: str, model: str, changes: tuple[tuple[str, Any], ...]) -> Any:
        hparams = load_hparams(method, model, dict(changes))
        run_as(hparams, device, dtype)
        return hparams

    first: dict[str, tuple[Cell, Any]] = {}
    for cell in plan.cells:
        try:
            hparams = hparams_of(cell.method, cell.model, tuple(cell.overrides.items()))
            check_method(hparams, cell.protocol != SINGLE)
            left_out([Method(cell.method, hparams)], [cell.protocol])
            if cell.size is not None:
                check_batches([cell.protocol], cell.size)
        except (HParamsError, HostError) as error:
            plan.refused[cell.name] = str(error)
            continue
        plan.hparams[cell.name] = hparams
        other, there = first.setdefault(cell.model, (cell, loading(hparams)))
        if there != loading(hparams):
            raise SweepError(
                f"models: {cell.model} is loaded differently by {other.method}, {there}, and {cell.method}, {loading(hparams)} "
                "(model, device, model_parallel, dtype); exclude one of them"
            )


def _data(value: Any, folder: Path) -> dict[str, Data]:
    if value is None:
        return {OWN: Data(None)}
    if not isinstance(value, dict) or not value:
        raise SweepError(f"data is {value!r}; allowed: a mapping of names of yours to files of edits")
    found = {}
    for name, of in value.items():
        of = {"file": of} if isinstance(of, str) else of
        if name == OWN and of is None:
            found[OWN] = Data(None)
        elif not isinstance(of, dict) or not isinstance(of.get("file"), str) or of.keys() - {"file", "datatype"}:
            raise SweepError(f"data.{name} is {of!r}; allowed: a file, or {{file: …, datatype: …}}; nothing for {OWN!r}")
        elif not isinstance(of.get("datatype"), str | None):
            raise SweepError(f"data.{name}.datatype is {of['datatype']!r}; allowed: the name of one layout, or nothing")
        else:
            found[str(name)] = Data(str(folder / of["file"]), of.get("datatype"))
    return found


def _overrides(value: Any, methods: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """For every method, what each of its cells has in the place of its YAML's."""
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(of, dict) for of in value.values()):
        raise SweepError(f"overrides is {value!r}; allowed: METHOD: {{hyper-parameter: [values]}}")
    if unknown := value.keys() - set(methods):
        raise SweepError(f"overrides names {sorted(map(str, unknown))[0]!r}; allowed: a method of methods")
    found = {}
    for method in methods:
        of = {key: values if isinstance(values, list) else [values] for key, values in value.get(method, {}).items()}
        for key, values in of.items():
            if not values or not all(isinstance(v, (str, int, float, bool)) for v in values):
                raise SweepError(f"overrides.{method}.{key} is {values!r}; allowed: numbers, text, true or false")
        found[method] = [dict(zip(of, values)) for values in product(*of.values())]
    return found


_OF_CELL = {f.name for f in fields(Cell)} & {"model", "method", "data", "protocol", "size", "seed", "order"}


def _without(cells: list[Cell], value: Any) -> list[Cell]:
    """The cells that no entry of ``exclude`` is true of."""
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry for entry in entries):
        raise SweepError(f"exclude is {value!r}; allowed: a list of mappings, such as {{method: ROME, size: 500}}")
    excluded = set()
    for entry in entries:
        wanted = {key: of if isinstance(of, list) else [of] for key, of in entry.items()}
        known = _OF_CELL | {key for cell in cells for key in cell.overrides}
        if unknown := wanted.keys() - known:
            raise SweepError(f"exclude names {sorted(map(str, unknown))[0]!r}; allowed: {', '.join(sorted(known))}")
        if "size" in wanted:
            wanted["size"] = [None if size == "all" else size for size in wanted["size"]]
        there = {
            cell.name
            for cell in cells
            if all((getattr(cell, key) if key in _OF_CELL else cell.overrides.get(key)) in of for key, of in wanted.items())
        }
        if not there:
            raise SweepError(f"exclude has {entry!r}, which is true of no cell; take it out, or mend it")
        excluded |= there
    return [cell for cell in cells if cell.name not in excluded]


def _resources(config: Mapping[str, Any], model: str, all_hparams: list[Any]) -> Resources:
    on_cuda = any(device_name(hparams.device).startswith("cuda") for hparams in all_hparams)

    def of(key: str, default: Any) -> Any:
        value = config.get(key)
        value = value.get(model) if isinstance(value, dict) else value
        return default if value is None else value

    gpus, cpus, memory = of("num_gpus", 1 if on_cuda else 0), of("num_cpus", None), of("memory", None)
    for key, value in (("num_gpus", gpus), ("num_cpus", 1 if cpus is None else cpus)):
        least = 1 if key == "num_cpus" else 0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise SweepError(f"{key} is {value!r}; allowed: a number, {least} or above, or a mapping of models to numbers")
    if gpus > 1 and gpus != int(gpus):
        raise SweepError(f"num_gpus is {gpus!r}; allowed: a fraction of one GPU, or whole GPUs")
    return Resources(gpus, cpus, None if memory is None else _bytes(memory))


def _bytes(value: Any) -> int:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) *([KMGT]?B?)", str(value))
    if not found or found[2] not in _UNITS:
        raise SweepError(f"memory is {value!r}; allowed: a number of bytes, or such as 40GB")
    return int(float(found[1]) * _UNITS[found[2]])


# --------------------------------------------------------------------------------------------------------------------
# What a key may hold. A check takes a value and returns it, or raises ValueError saying what is allowed.


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def _protocol(value: Any) -> str:
    if value not in (SINGLE, SEQUENTIAL) and not re.fullmatch(r"batches-([2-9]|[1-9][0-9]+)", str(value)):
        raise ValueError(f"{SINGLE}, {SEQUENTIAL}, {in_batches(10)} and the like")
    return str(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("whole numbers, 1 or above")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("whole numbers, 0 or above")
    return value


def _size(value: Any) -> int | None:
    try:
        return None if value == "all" else _count(value)
    except ValueError as error:
        raise ValueError(f"{error}, or all") from None


def _among(*allowed: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(", ".join(allowed))
        return value

    return check


def _list(
    config: Mapping[str, Any], key: str, check: Callable[[Any], Any], default: list[Any] | None = None, empty: bool = False
) -> list[Any]:
    """A key's values, one or several, or where it may be ``empty`` none; without a default it has to be given."""
    value = config.get(key, default)
    if value is None:
        raise SweepError(f"missing key {key!r}")
    values = value if isinstance(value, list) else [value]
    try:
        found = [check(one) for one in values]
    except ValueError as allowed:
        raise SweepError(f"{key} is {value!r}; allowed: {allowed}") from None
    if not found and not empty:
        raise SweepError(f"{key} is empty; name at least one")
    if twice := [one for one in found if found.count(one) > 1]:
        raise SweepError(f"{key} names {twice[0]!r} twice; name each once")
    return found


def _one(config: Mapping[str, Any], key: str, check: Callable[[Any], Any]) -> Any:
    return None if config.get(key) is None else _list({key: [config[key]]}, key, check)[0]


def _one_of(config: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str) -> str:
    return _one(config, key, _among(*allowed)) or default


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise SweepError(f"{key} is {value!r}; allowed: true or false")
    return value


def _file(config: Mapping[str, Any], key: str, folder: Path) -> str | None:
    value = _one(config, key, _text)
    return str(folder / value) if value else None
