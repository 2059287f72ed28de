"""Work here, side by side in processes of one thread each, which end with the one that started them, or on Ray."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from gradleak.errors import InvalidInput, UnknownName, reason

__all__ = ["EXECUTORS", "side_by_side", "spread"]

EXECUTORS = ("here", "processes", "ray")
"""Where work may run: in this process, in processes beside it, on a Ray cluster."""

Work = Callable[[Any], Any]
Done = Callable[[int, Any, Any], None]


def spread(
    executor: str, work: Work, items: Sequence[Any], done: Done, *, jobs: int = 2, address: str | None = None
) -> None:
    """Call ``work(item)`` for every item, here or elsewhere, and ``done`` as :func:`side_by_side` does, always here.

    Args:
        executor: one of :data:`EXECUTORS`; "ray" needs the extra ``ray``.
        work: see :func:`side_by_side`.
        items: what is worked on; results may come in another order.
        done: receives the number of finished items, the one that has just finished, and what it returned.
        jobs: number of processes.
        address: of a running Ray cluster ("auto", or a host and a port); None starts one on this machine.

    Raises:
        UnknownName: there is no such executor.
        InvalidInput: Ray is not installed, or there is no cluster at ``address``.
    """
    if executor not in EXECUTORS:
        raise UnknownName("executor", executor, EXECUTORS)
    if executor == "ray":
        _on_ray(work, items, done, jobs, address)
    elif executor == "processes" and len(items) > 1:
        side_by_side(jobs, work, items, done)
    else:
        for count, item in enumerate(items, 1):
            done(count, item, work(item))


def _on_ray(work: Work, items: Sequence[Any], done: Done, jobs: int, address: str | None) -> None:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise InvalidInput("Ray is not installed; install the extra 'ray', or choose --executor processes.") from None
    started = not ray.is_initialized()
    if started:
        # One thread each: workers inherit this environment, and the cluster's own start with theirs.
        options = {"address": address} if address else {"num_cpus": jobs, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"There is no Ray cluster at {address!r} ({reason(error)}); start one with ray start --head."
            ) from error
    try:
        remote = ray.remote(num_cpus=1)(_call)
        running = {remote.remote(work, item): item for item in items}
        waiting, count = list(running), 0
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                count += 1
                done(count, running[reference], ray.get(reference))
    finally:
        if started:
            ray.shutdown()


def _call(work: Work, item: Any) -> Any:
    return work(item)


def side_by_side(jobs: int, work: Work, items: Sequence[Any], done: Done) -> None:
    """Call ``work(item)`` for every item in ``jobs`` processes of one thread each.

    ``work`` belongs to an installed module (or is a ``functools.partial`` of such a function); it, items and results
    can be sent to a process. ``done`` receives the number of finished items, the one that has just finished, and what
    it returned. The processes end as soon as this call does, with an error, an interruption or the death of this
    process.
    """
    context = multiprocessing.get_context("spawn")
    # Nobody writes into this pipe: it ends when this process closes it or dies, even by SIGKILL.
    watched, held = context.Pipe(duplex=False)
    with (
        watched,
        concurrent.futures.ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_prepare, initargs=(watched,)
        ) as pool,
        held,
    ):
        futures = {pool.submit(work, item): item for item in items}
        try:
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                done(count, futures[future], future.result())
        except BaseException:
            # Leaving the pool would otherwise wait until what has begun is measured.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def _prepare(watched: Connection) -> None:
    torch.set_num_threads(1)  # noqa: TID251  (this worker process is ours, and its siblings want the other cores)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    try:
        watched.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
