"""Work side by side in processes of one thread each, which end with the process that started them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

__all__ = ["side_by_side"]


def side_by_side(
    jobs: int, work: Callable[[Any], Any], items: Sequence[Any], done: Callable[[int, Any, Any], None]
) -> None:
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
