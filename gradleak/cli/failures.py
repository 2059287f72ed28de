"""What an error that is not gradleak's own means."""

from __future__ import annotations

from gradleak.errors import clean

__all__ = ["is_memory", "reason"]


def is_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: torch's allocator on the CPU says so in a RuntimeError without a type of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        w in str(error) for w in ("DefaultCPUAllocator", "not enough memory")
    )


def reason(error: BaseException) -> str:
    """Return the first line of what ``error`` says, or its type where it says nothing, for use inside a sentence."""
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return clean(line or type(error).__name__, 400)
