"""Captures: what left a client, in a folder with a manifest, as adapters write it and commands read it.

A folder with ``capture.json`` holds one update. Of many rounds and clients, each has a subfolder with a manifest of its
own; weights are stored once, however many clients received them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gradleak.data.tables import schema_bytes
from gradleak.errors import InvalidFile, InvalidInput, clean, reason
from gradleak.files import Content, read_file, write_bytes, write_files
from gradleak.models.loading import Option
from gradleak.spaces import ImageSpace, InputSpace, TableSpace, TokenSpace
from gradleak.training import SGD, Adam, BinaryCrossEntropy, CrossEntropy, FedAvg, LocalTraining, MeanSquaredError
from gradleak.types import Batch, Note, NoteKind, Update, UpdateKind

__all__ = ["MANIFEST", "Capture", "Entry", "Manifest", "describe_space", "describe_training", "read_capture",
           "write_capture"]  # fmt: skip

MANIFEST = "capture.json"
_SCHEMA, _VERSION = "gradleak-capture", 1
_LARGEST = 1 << 20
"""Bytes of a manifest, at most."""
_MOST = 100_000
"""Subfolders of a capture, at most."""
_SHOWN = 6
"""Names that a sentence lists."""
_FILES = ("lora", "weights", "update", "table", "truth")
"""Fields that name a file, or a folder, of the capture."""
_CODE = ("model", "loss")
"""Fields that may name code."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of one exchange; absent is what is not known.

    The first block says where the update comes from, ``more`` holds what gradleak does not know. All other fields are
    options of ``gradleak attack`` and mean what ``docs/command-line.md`` says of them.

    Attributes:
        framework: the software that the client runs, with its version.
        number_format: type of the numbers as they were sent, such as float16.
        unknown_filters: what the client does to its update in a way that no ``defense`` describes.
        created: when, UTC, ISO 8601; :func:`write_capture` fills it in.
    """

    framework: str | None = None
    round: int | None = None
    client: str | None = None
    number_format: str | None = None
    unknown_filters: tuple[str, ...] = ()
    created: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    model: str | None = None
    task: str | None = None
    lora: str | None = None
    model_arg: Mapping[str, Option] = field(default_factory=dict)
    weights: str | None = None
    update: str | None = None
    kind: str = UpdateKind.GRADIENT.value
    input_shape: tuple[int, ...] = ()
    input_kind: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    table: str | None = None
    classes: int | None = None
    mode: str | None = None
    batch_size: int | None = None
    loss: str | None = None
    reduction: str | None = None
    label_smoothing: float | None = None
    class_weights: tuple[float, ...] = ()
    lr: float | None = None
    optimizer: str | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    local_epochs: int | None = None
    local_steps: int | None = None
    local_batch_size: int | None = None
    defense: tuple[str, ...] = ()
    truth: str | None = None


_ABOUT = ("framework", "round", "client", "number_format", "unknown_filters", "created", "more")


@dataclass(frozen=True)
class Entry:
    """One update of a capture.

    Attributes:
        manifest: what is known of it.
        folder: where its manifest lies.
        root: the folder of the whole capture, which none of its files may leave.
    """

    manifest: Manifest
    folder: Path
    root: Path

    @property
    def name(self) -> str:
        """The update in a reader's words."""
        said = "" if self.manifest.round is None else f"round {self.manifest.round}"
        if self.manifest.client is not None:
            said += f"{' of ' if said else ''}client {self.manifest.client!r}"
        return said or "the update"

    @property
    def notes(self) -> tuple[Note, ...]:
        """What a reader of a result must know about the manifest."""
        notes = []
        if self.manifest.more:
            what = f"The capture's manifest has {_some(self.manifest.more)}, which gradleak does not know and left out."
            notes.append(Note(clean(what), NoteKind.LIMIT))
        if self.manifest.unknown_filters:
            what = (
                f"The client filters its update with {_some(self.manifest.unknown_filters)}, which gradleak cannot "
                "simulate; the update was attacked as if nothing had been done to it."
            )
            notes.append(Note(clean(what), NoteKind.ASSUMPTION))
        return tuple(notes)

    def options(self, without: Collection[str] = ()) -> dict[str, str | list[str] | Path]:
        """Return the options of ``gradleak attack`` that the manifest states, by name, as words of a command line.

        Args:
            without: names of options that are not wanted, and therefore not checked either.

        Raises:
            InvalidFile: a file lies outside of the capture, or code outside of the current folder.
        """
        found: dict[str, str | list[str] | Path] = {}
        for item in fields(self.manifest):
            value = getattr(self.manifest, item.name)
            if item.name in _ABOUT or item.name in without or value in (None, (), {}):
                continue
            if item.name in _FILES:
                found[item.name] = self.path(value)
            elif item.name in _CODE:
                found[item.name] = self._code(item.name, value)
            elif isinstance(value, Mapping):
                found[item.name] = [f"{k}={v}" for k, v in value.items()]
            elif item.name == "defense":
                found[item.name] = list(value)
            else:
                found[item.name] = ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
        return found

    def path(self, name: str) -> Path:
        """Return the path of a file that the manifest names.

        Raises:
            InvalidFile: it lies outside of the capture.
        """
        try:
            path = (self.folder / name).resolve()
            inside = path.is_relative_to(self.root.resolve())
        except (OSError, ValueError, RuntimeError):  # null bytes, loops of links
            inside = False
        if not inside:
            raise InvalidFile(
                f"The manifest in {str(self.folder)!r} names {clean(name, 100)!r}, which lies outside of the capture "
                f"{str(self.root)!r}; copy the file into it, or name the folder above where that is the capture."
            )
        return path

    def _code(self, option: str, spec: str) -> str:
        """Return ``spec``, of which nothing runs but what lies in the current folder, the user's own."""
        if ":" not in spec:
            return spec
        if option == "model" and spec.startswith("hf:"):
            return f"hf:{self.path(spec.removeprefix('hf:'))}"
        if not _is_own(spec, self.root.resolve()):
            raise InvalidFile(
                f"The capture names the code {clean(spec, 100)!r}, which does not lie in the current folder, and "
                f"captures run no other; if you trust it, say --{option} {clean(spec, 100)} yourself."
            )
        return spec


@dataclass(frozen=True)
class Capture:
    """The updates in a folder, sorted by round and client."""

    folder: Path
    entries: tuple[Entry, ...]

    def entry(self, round: int | None = None, client: str | None = None) -> Entry:
        """Return the update of this round and client; either may be left out where that leaves one.

        Raises:
            InvalidInput: there are none or several.
        """
        found = [
            e
            for e in self.entries
            if (round is None or e.manifest.round == round) and (client is None or e.manifest.client == client)
        ]
        if len(found) != 1:
            shown = "; ".join(e.name for e in (found or self.entries)[:_SHOWN])
            more = ", …" if len(found or self.entries) > _SHOWN else ""
            what = f"{len(found):,} such updates" if found else "no such update"
            raise InvalidInput(f"The capture {str(self.folder)!r} has {what} ({shown}{more}); choose one of them with "
                               "--round and --client.")  # fmt: skip
        return found[0]


def read_capture(folder: str | Path) -> Capture:
    """Return what a folder holds: its own manifest, or those of its subfolders.

    Tensors are not read, and nothing that a manifest names is run or opened.

    Raises:
        InvalidFile: there is no manifest, or one is damaged, too large or of a later version.
    """
    root = Path(folder)
    if (root / MANIFEST).is_file():
        return Capture(root, (Entry(_read_manifest(root / MANIFEST), root, root),))
    try:
        below = sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.is_dir())
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{str(root)!r} is no folder that can be read; name that of a capture.") from error
    if len(below) > _MOST:
        raise InvalidFile(f"{str(root)!r} has {len(below):,} subfolders, {_MOST:,} at most; name that of a capture.")
    below = [p for p in below if (p / MANIFEST).is_file()]
    if not below:
        raise InvalidFile(
            f"There is no {MANIFEST} in {str(root)!r} or its subfolders; name the folder of a capture, or describe the "
            "update with --model, --weights and --update."
        )
    entries = [Entry(_read_manifest(p / MANIFEST), p, root) for p in below]
    entries.sort(key=lambda e: (-1 if e.manifest.round is None else e.manifest.round, e.manifest.client or ""))
    return Capture(root, tuple(entries))


def write_capture(
    folder: str | Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    update: Update | Mapping[str, Tensor],
    *,
    space: InputSpace | None = None,
    truth: Batch | None = None,
) -> Path:
    """Add one update to the capture ``folder``, whole or not at all, and return the folder of its manifest.

    Processes may write to one capture side by side. What is there of the same round and client is replaced.

    Args:
        folder: of the capture; made if need be.
        manifest: what is known; the names of files are filled in.
        weights: W, the state dict that was sent out.
        update: U, what the client shared, by parameter name; an ``Update`` brings its kind.
        space: what one input is, where the manifest does not say it.
        truth: the private batch, decoded. **Only ever hand it over on purpose**: it is stored as it is.

    Raises:
        InvalidFile: the folder cannot be written.
        InvalidInput: the space cannot be written down.
    """
    root = Path(folder)
    one = manifest.round is None and manifest.client is None
    parts = [f"round-{manifest.round}"] * (manifest.round is not None)
    parts += [f"client-{_slug(manifest.client)}"] * (manifest.client is not None)
    home = root if one else root / "-".join(parts)
    sent = _plain(weights)
    stored = f"weights-{_checksum(sent)}.safetensors"
    tensors = update.tensors if isinstance(update, Update) else update
    files: dict[str, Content] = {"U.safetensors": partial(save_file, _plain(tensors))}
    told = _told(manifest) | ({} if space is None else describe_space(space))
    told |= {"weights": stored if one else f"../{stored}", "update": "U.safetensors"}
    if isinstance(update, Update):
        told["kind"] = update.kind.value
    told.setdefault("number_format", str(next(iter(tensors.values())).dtype).removeprefix("torch."))
    told.setdefault("created", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    if isinstance(space, TableSpace):
        files["table.json"] = schema_bytes(space)
    if truth is not None:
        private = _plain({"inputs": truth.inputs, "labels": truth.labels})
        files["truth.safetensors"] = partial(save_file, private)
        told["truth"] = "truth.safetensors"
    head = {"schema": _SCHEMA, "version": _VERSION}
    files[MANIFEST] = (json.dumps(head | told, indent=1, ensure_ascii=False) + "\n").encode()
    if not (root / stored).exists():
        root.mkdir(parents=True, exist_ok=True)
        write_bytes(root / stored, partial(save_file, sent))
    write_files(home, files, drop=[n for n in ("table.json", "truth.safetensors") if n not in files])
    return home


def describe_space(space: InputSpace) -> dict[str, Any]:
    """Return the fields of a :class:`Manifest` that describe an input; of a table, its schema is a file.

    Raises:
        InvalidInput: sentences cannot be described.
    """
    if isinstance(space, TokenSpace):
        raise InvalidInput(
            "The folder of a language model describes its sentences; leave the space out, and name it as hf:DIR."
        )
    if isinstance(space, TableSpace):
        return {"table": "table.json"}
    found: dict[str, Any] = {"input_shape": tuple(space.shape)}
    if isinstance(space, ImageSpace):
        return found | {"input_kind": "image"} | {k: v for k in ("mean", "std") if (v := tuple(getattr(space, k)))}
    return found | {"input_kind": "tensor"}


def describe_training(training: LocalTraining) -> dict[str, Any]:
    """Return the fields of a :class:`Manifest` that describe a client's training without its defenses.

    What no option of the command line says is left to ``more``, where a note names it.
    """
    plain = training.undefended
    found: dict[str, Any] = {"kind": plain.kind.value}
    more: dict[str, Any] = {}
    loss = plain.loss
    if isinstance(loss, CrossEntropy):
        found |= {"loss": "cross-entropy", "reduction": loss.reduction}
        found |= {"label_smoothing": loss.label_smoothing} if loss.label_smoothing else {}
        found |= {"class_weights": tuple(loss.weight)} if loss.weight is not None else {}
    elif isinstance(loss, BinaryCrossEntropy):
        found |= {"loss": "bce", "reduction": loss.reduction}
        found |= {"class_weights": (loss.pos_weight,)} if loss.pos_weight != 1 else {}
    elif isinstance(loss, MeanSquaredError):
        found |= {"loss": "mse", "reduction": loss.reduction}
    else:
        more["own_loss"] = type(loss).__name__
    if isinstance(plain, FedAvg):
        rule = plain.rule
        found |= {"lr": rule.lr, "local_batch_size": plain.batch_size}
        found |= {"local_epochs": plain.epochs} if plain.steps is None else {"local_steps": plain.steps}
        if isinstance(rule, SGD):
            found |= {"optimizer": "sgd", "momentum": rule.momentum, "weight_decay": rule.weight_decay}
            more |= {"nesterov": True} if rule.nesterov else {}
        elif isinstance(rule, Adam):
            found |= {"optimizer": "adamw" if rule.decoupled else "adam", "weight_decay": rule.weight_decay}
            usual = Adam()
            more |= {k: getattr(rule, k) for k in ("betas", "eps") if getattr(rule, k) != getattr(usual, k)}
    return {k: v for k, v in found.items() if v is not None} | ({"more": more} if more else {})


# ----------------------------------------------------------------------------------------------- reading manifests


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a finite number")
    return float(value)


def _list(of: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def check(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError("a list")
        return tuple(map(of, value))

    return check


def _options(value: object) -> dict[str, Option]:
    if not isinstance(value, dict) or not all(isinstance(v, (bool, int, float, str)) for v in value.values()):
        raise ValueError("an object of texts and numbers")
    return value


_TYPES: dict[str, Callable[[object], Any]] = (
    dict.fromkeys(("framework", "client", "number_format", "created", *_FILES, *_CODE), _text)
    | dict.fromkeys(("task", "kind", "input_kind", "mode", "reduction", "optimizer"), _text)
    | dict.fromkeys(("round", "classes", "batch_size", "local_epochs", "local_steps", "local_batch_size"), _count)
    | dict.fromkeys(("label_smoothing", "lr", "momentum", "weight_decay"), _number)
    | dict.fromkeys(("mean", "std", "class_weights"), _list(_number))
    | dict.fromkeys(("unknown_filters", "defense"), _list(_text))
    | {"input_shape": _list(_count), "model_arg": _options}
)


def _read_manifest(path: Path) -> Manifest:
    try:
        data = json.loads(read_file(path, limit=_LARGEST).decode())
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{str(path)!r} is no JSON ({reason(error)}); have the adapter write it again.") from error
    if not isinstance(data, dict) or data.get("schema") != _SCHEMA:
        raise InvalidFile(f'{str(path)!r} is no manifest of a capture; it must have "schema": "{_SCHEMA}".')
    if data.get("version") != _VERSION:
        raise InvalidFile(f"{str(path)!r} is a capture of a version other than {_VERSION}; update gradleak.")
    known: dict[str, Any] = {}
    for name, value in data.items():
        if name in _TYPES and value is not None:
            try:
                known[name] = _TYPES[name](value)
            except (ValueError, OverflowError) as error:
                raise InvalidFile(f"{name!r} in {str(path)!r} must be {reason(error)}; correct it.") from error
    return Manifest(**known, more={k: v for k, v in data.items() if k not in (*_TYPES, "schema", "version")})


def _told(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest states, as JSON has it."""
    stated = {f.name: getattr(manifest, f.name) for f in fields(manifest) if f.name != "more"}
    return {k: v for k, v in stated.items() if v not in (None, (), {})} | dict(manifest.more)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return dense tensors on the CPU; of those that share memory, which the format refuses, copies."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if memory in seen or value.untyped_storage().nbytes() > value.nbytes else value
        seen.add(memory)
    return plain


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 digits by which weights are told apart: names, shapes, and a checksum of each, which costs little."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        data = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape), data)).encode())
    return total.hexdigest()[:16]


def _slug(client: str | None) -> str:
    """Return a name for a folder, another one for every client."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", client or "")[:60]
    return plain if plain == client else f"{plain}-{hashlib.sha256((client or '').encode()).hexdigest()[:8]}"


def _is_own(spec: str, root: Path) -> bool:
    """Tell whether the module of ``module:name`` is a file below the current folder and not part of the capture."""
    module, _, _ = spec.rpartition(":")
    here = Path.cwd().resolve()
    if module.endswith(".py"):
        files = [here / module]
    else:
        parts = module.split(".")
        if not all(p.isidentifier() for p in parts) or parts[0] in sys.stdlib_module_names:
            return False
        loaded = getattr(sys.modules.get(parts[0]), "__file__", None)
        if loaded is not None and not Path(loaded).resolve().is_relative_to(here):
            return False
        files = [here.joinpath(*parts[:-1], f"{parts[-1]}.py"), here.joinpath(*parts, "__init__.py")]
    try:
        found = [f.resolve() for f in files if f.is_file()]
    except (OSError, ValueError):
        return False
    return bool(found) and all(f.is_relative_to(here) and not f.is_relative_to(root) for f in found)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(clean(str(n), 60)) for n in list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
