"""Where runs execute: processes on this machine, or a Ray cluster. An engine is something that runs a list of jobs."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from lightning_efficient.ablation.job import Job, run_job
from lightning_efficient.ablation.starters import Starter

ENGINES = ("local", "ray")
_DEVICES = "CUDA_VISIBLE_DEVICES"


class Engine(Protocol):
    """Runs jobs, as many at a time as it has room for."""

    def start(self, jobs: Sequence[Job]) -> None:
        """Begin; returns at once."""

    def wait(self, seconds: float) -> bool:
        """Whether all jobs have ended, after this long at most. Raises what a job raised."""

    def stop(self) -> None:
        """End what runs and give everything back; what has ended stays as it is."""


class LocalEngine:
    """Processes on this machine.

    Args:
        slots: Environment of each job that runs at the same time, such as its devices.
        starter: How their processes begin; ``None``: afresh.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]], starter: Starter | None = None) -> None:
        self._slots: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for slot in slots:
            self._slots.put(slot)
        self._starter = starter
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max(1, len(slots)), thread_name_prefix="ablate")
        self._futures: list[Future[None]] = []

    def start(self, jobs: Sequence[Job]) -> None:
        """Begin; returns at once."""
        self._futures = [self._pool.submit(self._run, job) for job in jobs]

    def _run(self, job: Job) -> None:
        slot = self._slots.get()
        try:
            run_job(job, self._stopped.is_set, slot, self._starter)
        finally:
            self._slots.put(slot)

    def wait(self, seconds: float) -> bool:
        """Whether all jobs have ended, after this long at most. Raises what a job raised."""
        done, left = wait(self._futures, seconds, FIRST_EXCEPTION)
        for future in done:
            future.result()
        return not left

    def stop(self) -> None:
        """End what runs and give everything back; what has ended stays as it is."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayEngine:
    """Tasks of a Ray cluster, whose nodes see the output folder under the same path and have this package installed.

    Args:
        slots: As many jobs at a time on a cluster of its own; an existing one has its own size.
        address: Of an existing cluster, such as ``"auto"`` or ``"ray://head:10001"``. ``None``: start one here.
        threads: Cores of each job.
        gpus: GPUs of each job.

    Raises:
        ImportError: Ray is missing.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]], address: str | None, threads: int, gpus: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("the ray engine needs Ray: pip install 'lightning-efficient[ray]'.") from error
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            own = {} if address else {"num_cpus": len(slots) * threads, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, logging_level="error", **own)
        # One task, one process: a task that loses its node is recorded as killed, not started again unseen.
        options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
        self._task: Any = ray.remote(**options)(_ray_job)
        self._environment = {"OMP_NUM_THREADS": str(threads)}
        self._left: list[Any] = []

    def start(self, jobs: Sequence[Job]) -> None:
        """Begin; returns at once."""
        self._left = [self._task.remote(job, self._environment) for job in jobs]

    def wait(self, seconds: float) -> bool:
        """Whether all jobs have ended, after this long at most. Raises what a job raised."""
        if self._left:
            done, self._left = self._ray.wait(self._left, num_returns=len(self._left), timeout=seconds)
            self._ray.get(done)
        return not self._left

    def stop(self) -> None:
        """End what runs and give everything back; what has ended stays as it is."""
        for task in self._left:
            self._ray.cancel(task)
        self._ray.wait(self._left, num_returns=len(self._left), timeout=10) if self._left else None
        if self._ours:
            self._ray.shutdown()


def _ray_job(job: Job, environment: Mapping[str, str]) -> None:
    run_job(job, environment=environment)


def make_slots(config: Mapping[str, Any], jobs: int | None, threads: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """The environment of each job that may run at the same time.

    Args:
        config: The whole configuration: ``trainer.accelerator`` and ``trainer.devices`` say what a run needs.
        jobs: How many; ``None``: cores ÷ threads, or as many as the GPUs have room for.
        threads: Of each job, as ``OMP_NUM_THREADS``.
        gpus: Names of the GPUs that may be used.
    """
    own = {"OMP_NUM_THREADS": str(threads)}
    each = gpus_of_a_run(config, len(gpus))
    if not each:
        return [own] * (jobs or max(1, cores() // threads))
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    return [{**own, _DEVICES: groups[i % len(groups)]} for i in range(jobs or len(groups))]


def gpus_of_a_run(config: Mapping[str, Any], available: int) -> int:
    """How many GPUs a run takes.

    Args:
        config: The whole configuration.
        available: On this machine.
    """
    trainer = config.get("trainer", {})
    if not available or trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return 0
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return min(len(devices), available)
    number = str(devices)
    return min(int(number), available) if number.isdigit() and int(number) else available


def visible_gpus() -> list[str]:
    """Names of the CUDA devices that this process may use."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get(_DEVICES, "").split(",") if name]
    return named[:count] if named else list(map(str, range(count)))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
