"""Files and folders: read with a bound, written whole or not at all.

Whatever is being written has a name ``.NAME.MACHINE-PROCESS-RANDOM.partial``; what a killed process left under such
a name is removed when the same thing is written again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradleak.errors import InvalidFile, InvalidInput

__all__ = ["check_writable", "read_file", "sweep", "write_bytes", "write_files"]

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.partial")
_STALE = 24 * 3600.0
"""Seconds after which what another machine, of a shared disk, has begun counts as left behind."""


def read_file(path: str | Path, *, limit: int | None = None) -> bytes:
    """Return the content of a regular file.

    Args:
        path: devices and pipes are refused: they have no end, or wait for a writer.
        limit: most bytes that it may have; no more are read.

    Raises:
        InvalidFile: absent, no regular file, not readable, or larger than ``limit`` or the memory.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                what = (
                    "folder; name the file in it"
                    if stat.S_ISDIR(found.st_mode)
                    else ("device or a pipe; copy its content into a file")
                )
                raise InvalidFile(f"{str(path)!r} is a {what}.")
            if limit is not None and found.st_size > limit:
                raise InvalidFile(
                    f"{str(path)!r} has {found.st_size:,} bytes where at most {limit:,} are expected; "
                    "name the right file."
                )
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(found.st_size)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidFile(f"There is no file {str(path)!r}; check the path.") from error
    except (MemoryError, OverflowError) as error:
        raise InvalidFile(f"{str(path)!r} does not fit in memory; name the right file.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"{str(path)!r} cannot be read ({_reason(error)}); check its permissions.") from error


Content = bytes | Callable[[Path], object]
"""What a file will hold, or what writes it under the path that it is given."""


def write_bytes(path: str | Path, data: Content) -> None:
    """Write ``data`` to a temporary name in the same folder, then rename it; on failure nothing is left behind.

    Raises:
        InvalidFile: the file cannot be written there.
    """
    path = Path(path)
    try:
        sweep(path.parent, path.name)
        temporary = path.with_name(_partial(path.name))
        try:
            _store(temporary, data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _settle(path.parent)
    except OSError as error:
        raise InvalidFile(f"{str(path)!r} cannot be written ({_reason(error)}); choose another place.") from error


def write_files(directory: Path, files: Mapping[str, Content], *, drop: Sequence[str] = ()) -> None:
    """Write ``files`` into ``directory``: first all of them under temporary names, then under their own.

    A new folder appears in one step. In an existing one each file is replaced in one step, in the order given, and
    other files stay; a process that is killed between two of these steps leaves some files old and some new. On any
    failure, and on Ctrl-C, what was there before is put back.

    Args:
        directory: created with the folders above it, if need be.
        files: content by name.
        drop: names that are removed before the first of ``files`` is replaced.

    Raises:
        InvalidFile: they cannot be written there.
    """
    made: list[Path] = []
    temporary: Path | None = None
    try:
        try:
            _make_parents(directory.parent, made)
            existing = directory.is_dir()
            temporary = _make_temporary(directory)
            for name, data in files.items():
                _store(temporary / name, data)
            if existing:
                _replace(directory, temporary, files, drop)
            else:
                temporary.replace(directory)
            _settle(directory if existing else directory.parent)
        except BaseException:
            _remove(temporary, made)
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InvalidFile(
            f"The folder {str(directory)!r} cannot be written ({_reason(error)}); make room or name another one "
            "with --out."
        ) from error


def _replace(directory: Path, temporary: Path, files: Mapping[str, Content], drop: Sequence[str]) -> None:
    before = temporary / "before"
    before.mkdir()
    names = [*drop, *(name for name in files if name not in drop)]
    kept = [name for name in names if os.path.lexists(directory / name)]
    for name in kept:
        try:
            os.link(directory / name, before / name, follow_symlinks=False)
        except (OSError, NotImplementedError):  # disks without hard links
            shutil.copy2(directory / name, before / name, follow_symlinks=False)
    try:
        for name in drop:
            (directory / name).unlink(missing_ok=True)
        for name in files:
            (temporary / name).replace(directory / name)
    except BaseException:
        for name in names:
            if name in kept:
                (before / name).replace(directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        raise


def check_writable(directory: Path) -> None:
    """Check, before a long run, that ``directory`` can be written: by writing there, for root may be refused as well.

    Nothing of it stays behind.

    Raises:
        InvalidInput: it is a file, or :func:`write_files` would be refused there.
    """
    place = directory
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InvalidInput(f"{str(place)!r} is not a folder; name another one with --out.")
    made: list[Path] = []
    temporary: Path | None = None
    try:
        _make_parents(directory.parent, made)
        temporary = _make_temporary(directory)
        (temporary / "empty").touch()
    except OSError as error:
        raise InvalidInput(
            f"The folder {str(directory)!r} cannot be written ({_reason(error)}); name another one with --out."
        ) from error
    finally:
        _remove(temporary, made)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove from ``folder`` what killed processes have begun to write, of ``name`` only if one is given."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not entry.name.endswith(".partial"):
                continue
            begun = _PARTIAL.fullmatch(entry.name)
            if begun is None or name not in (None, begun["name"]) or not _abandoned(begun, entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


def _abandoned(begun: re.Match[str], entry: os.DirEntry[str]) -> bool:
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
        return True
    if begun["machine"] != _machine() or os.name == "nt":  # where asking for a process may end it
        return False
    try:
        os.kill(int(begun["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it belongs to somebody else
        return False
    return False


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _partial(name: str) -> str:
    return f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.partial"


def _store(path: Path, data: Content) -> None:
    if not isinstance(data, bytes):
        data(path)
    with path.open("xb" if isinstance(data, bytes) else "r+b") as file:
        if isinstance(data, bytes):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _settle(folder: Path) -> None:
    """Have the renames in ``folder`` survive a power cut, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Create ``folder`` and what is missing above it; append what is created to ``made``, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        place.mkdir()
        made.append(place)


def _make_temporary(directory: Path) -> Path:
    """Create a folder that can be renamed to ``directory``, or, if that exists, whose files can be moved into it."""
    # An existing folder may be a disk of its own, into which nothing can be renamed from outside.
    place = directory if directory.is_dir() else directory.parent
    sweep(place, directory.name)
    temporary = place / _partial(directory.name)
    temporary.mkdir()
    return temporary


def _remove(temporary: Path | None, made: list[Path]) -> None:
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _reason(error: BaseException) -> str:
    told = getattr(error, "strerror", None) or str(error)
    return str(told).strip().rstrip(".") or type(error).__name__
