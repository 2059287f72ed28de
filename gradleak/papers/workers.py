"""Cases measured side by side, in processes that end with the one that started them."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_package", "side_by_side"]


def load_package(name: str, folder: Path) -> None:
    """Make the Python files of ``folder`` importable as submodules of ``name``, whatever the folder is called."""
    for stale in [k for k in sys.modules if k == name or k.startswith(f"{name}.")]:
        del sys.modules[stale]
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def side_by_side(
    jobs: int,
    function: Callable[..., Any],
    work: Callable[[Callable[..., Any], Any], None],
    items: Sequence[Any],
    done: Callable[[int, Any], None],
) -> None:
    """Call ``work(function, item)`` for every item in ``jobs`` processes of one thread each.

    ``function`` belongs to an experiment that :func:`load_package` made importable, ``work`` to an installed module;
    items can be sent to a process. ``done`` receives the number of finished items and the one that has just finished.
    The processes end as soon as this call does, with an error, an interruption or the death of this process.
    """
    module = sys.modules[function.__module__]
    package = sys.modules[module.__name__.rpartition(".")[0]]
    where = (package.__name__, str(next(iter(package.__path__))), module.__name__, function.__name__)
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
        futures = {pool.submit(_call, where, work, item): item for item in items}
        try:
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                done(count, futures[future])
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


def _call(where: tuple[str, str, str, str], work: Callable[[Callable[..., Any], Any], None], item: Any) -> None:
    package, folder, module, function = where
    if getattr(sys.modules.get(package), "__path__", None) != [folder]:
        load_package(package, Path(folder))
    work(getattr(importlib.import_module(module), function), item)
