"""How near to linear a sweep's scheduling is: real Ray on this machine, with cells that sleep.

``python -m kdpo_easyedit.sweep.simulate --cells 10000 --workers 64 --seconds 5``
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .tasks import Place, Resources, Task, connect


def sleep(place: Place, seconds: float) -> None:
    """A cell that waits, as one whose work is a GPU's does."""
    time.sleep(seconds)


def meet(place: Place, number: int, of: int) -> None:
    """Ends when so many workers are there."""
    (place.root / f"here-{number}").touch()
    while len(list(place.root.glob("here-*"))) < of:
        time.sleep(0.5)


def simulate(cells: int, workers: int, seconds: float) -> dict[str, float]:
    """Cells on a cluster of one machine that says it has so many CPUs.

    Returns:
        ``wall``: seconds from the first cell's beginning, when all workers are there, to the last one's end; ``ideal``: those
        of workers that never wait; ``efficiency``: the one over the other; ``driver``: the driver's processor seconds a cell;
        ``idle``: seconds a cell that its worker waited for it.
    """
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    one_each = Resources(num_cpus=1)
    try:
        with tempfile.TemporaryDirectory() as folder, connect("auto", Path(folder)) as pool:
            # Workers take seconds to begin, once; here they are begun before the clock is.
            for number in range(workers):
                pool.submit(Task(f"first {number}", meet, (number, workers), resources=one_each))
            for _ in pool.events():
                pass
            pool.submit(*(Task(str(number), sleep, (seconds,), resources=one_each) for number in range(cells)))
            started, processor = time.perf_counter(), time.process_time()
            done = sum(event.state == "done" for event in pool.events())
            wall, processor = time.perf_counter() - started, time.process_time() - processor
    finally:
        ray.shutdown()
    if done != cells:
        raise RuntimeError(f"{done} of {cells} cells are done")
    ideal = -(-cells // workers) * seconds
    return {
        "wall": wall,
        "ideal": ideal,
        "efficiency": ideal / wall,
        "driver": processor / cells,
        "idle": (wall - ideal) * workers / cells,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="that a cell sleeps (default: 5)")
    options = parser.parse_args(arguments)
    for name, value in simulate(options.cells, options.workers, options.seconds).items():
        print(f"{name:<12}{value:.4f}")


if __name__ == "__main__":
    main()
