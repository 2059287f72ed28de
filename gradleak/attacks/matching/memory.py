"""How much memory a search will take, worked out before it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradleak.errors import ResourceLimit

__all__ = ["available", "candidate_bytes", "fitting"]

_SHARE = 0.7  # Of the free memory; the rest is for fragments and for what is not counted.


def available(device: torch.device) -> int:
    """Return the free memory in bytes: of the GPU, or of the machine within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
    except (OSError, ValueError):
        pass  # Not Linux: the fallback below serves.
    try:
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # No container, or no limit in it.
    return max(min(free), 0) if free else 8 << 30


class _Counting(TorchDispatchMode):
    """Adds up the bytes of everything that operations return, except views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            for t in pytree.tree_leaves(found):
                if isinstance(t, Tensor):
                    self.total += t.numel() * t.element_size()
        return found


def candidate_bytes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Return the bytes of all intermediate tensors of ``function(*arguments)``, which is run on shapes alone.

    That is what it takes if nothing is freed on the way; a gradient of a gradient frees little. A model that does not
    run on shapes alone, because it looks at values, counts for nothing.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Counting() as counting:
        fakes = pytree.tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, arguments)
        before = counting.total
        try:
            function(*fakes)
        except Exception:  # noqa: BLE001 - it is the user's module, which may raise anything
            return 0
    return counting.total - before


def fitting(wanted: int, each: int, keeps: int, *, once: int, free: int) -> int:
    """Return how many candidates fit at a time, at most ``wanted``.

    Of ``free`` bytes the gradient of ``each`` candidate takes so many, the solver ``keeps`` some of each, and some are
    needed ``once``, however many candidates there are.

    Raises:
        ResourceLimit: not even one fits.
    """
    # Freed memory is counted too, about as much again as is held at the peak; one candidate is refused only beyond it.
    if keeps + (each + once) / 2 > free:
        raise ResourceLimit(
            f"One candidate of this search needs about {(keeps + (each + once) / 2) / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB of memory are free; use a smaller batch or model, or dtype=torch.float32."
        )
    return max(1, min(wanted, int((_SHARE * free - once) / max(each + keeps, 1))))
