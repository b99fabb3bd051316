"""Tasks of lm-evaluation-harness, by its Python interface, on the model in memory. Optional: the extra ``ability``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..easyedit import host

_Z = 1.96  # of 95 %


class TasksError(RuntimeError):
    """Tasks that cannot be had; the message names them and says what to do."""


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data is there. Making this looks, before any expensive work.

    Args:
        names: tasks, groups or tags of the harness, or the paths of YAMLs of one's own.
        limit: how many questions of every task; None for all.

    Raises:
        TasksError: the harness is not installed, or a task or its data cannot be had.
    """

    names: Sequence[str]
    limit: int | None
    _manager: Any = field(init=False, repr=False)
    _shown: list[str] = field(init=False, repr=False)  # the results that are asked for: of a group its own

    def __post_init__(self) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise TasksError(
                f"ability_tasks is {','.join(self.names)!r}, and lm-evaluation-harness cannot be imported ({error}); "
                "pip install 'lm_eval[hf]', or leave ability_tasks out"
            ) from None
        manager, shown = TaskManager(), []
        for name in self.names:
            try:
                loaded = manager.load([name])
            except KeyError:
                raise TasksError(
                    f"ability_tasks names {name!r}, which is no task of lm-evaluation-harness and no YAML of one; "
                    "`lm_eval ls tasks` lists them"
                ) from None
            except Exception as error:  # whatever a task's own code or its data raises
                reason = " ".join(str(error).split())[:300]
                raise TasksError(
                    f"ability_tasks names {name!r}, which cannot be loaded: {type(error).__name__}: {reason}"
                ) from None
            shown += [name] if name in loaded["groups"] else list(loaded["tasks"])
        object.__setattr__(self, "_manager", manager)
        object.__setattr__(self, "_shown", shown)

    def measured(self, model: Any, tok: Any) -> dict[str, Any]:
        """A model's scores, as the harness has them: ``further`` by task and metric, ``intervals`` from its standard errors.

        Empty for a model in a wrapper, which decides for each prompt by itself whether an edit is asked for.
        """
        if host.is_wrapper(model):
            return {"further": {}, "intervals": {}}
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # It sets the tokenizer as it needs it.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tok), batch_size=8, truncation=True)
        found = simple_evaluate(
            lm,
            tasks=list(self.names),
            limit=self.limit,
            task_manager=self._manager,
            bootstrap_iters=1000,
            log_samples=False,
        )["results"]
        further, intervals = {}, {}
        for name in self._shown:
            for key, value in found[name].items():
                metric, _, of = key.partition(",")
                if not of or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                    continue
                label = f"task: {name} {metric}" + (f" ({of})" if of != "none" else "")
                further[label] = round(float(value), 4)
                spread = found[name].get(f"{metric}_stderr,{of}")
                if isinstance(spread, (int, float)):
                    intervals[label] = [round(value - _Z * spread, 4), round(value + _Z * spread, 4)]
        return {"further": further, "intervals": intervals}
