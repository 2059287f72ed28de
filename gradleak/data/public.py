"""Named real data: from a folder laid out as ``docs/data.md`` says, or from public loaders."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradleak.data.archives import read_arrays
from gradleak.data.images import load_images
from gradleak.errors import InvalidFile, InvalidInput
from gradleak.files import write_bytes

__all__ = ["file", "images", "require"]

_TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn_mini": "SVHN"}
_VISION = "'vision' (torchvision) on a machine with a network"
_WIKITEXT = {"wikitext2_valid.txt": "validation", "wikitext2_test.txt": "test", "wikitext2_train.txt": "train"}


def _missing(name: str, data: Path | None, other: str) -> InvalidInput:
    where = f"is not in {data}" if data is not None else "was not given"
    return InvalidInput(
        f"The data file {name!r} {where}; pass --data DIR with a folder laid out as docs/data.md says, or {other}."
    )


def file(name: str, data: Path | None, downloads: Path) -> Path:
    """Return the path of ``name`` in ``data``, or of the copy a public loader fetched into ``downloads``.

    Raises:
        InvalidInput: neither has it; names both ways.
    """
    for folder in (data, downloads):
        if folder is not None and (folder / name).is_file():
            return folder / name
    if name in _WIKITEXT or name == "bert_base_uncased_vocab.txt":
        return _fetched(name, data, downloads)
    stem = name.removesuffix(".npz")
    raise _missing(name, data, f"ask for its images by name ({stem!r})" if stem in _TORCHVISION else "create it")


def require(name: str, data: Path | None, downloads: Path) -> None:
    """Check, without loading images, that ``name`` is in ``data`` or that a public loader may provide it.

    Raises:
        InvalidInput: neither can; names both ways.
    """
    stem = name.removesuffix(".npz")
    if stem not in _TORCHVISION or (data is not None and (data / name).is_file()):
        file(name, data, downloads)
    elif importlib.util.find_spec("torchvision") is None:
        raise _missing(name, data, f"install the extra {_VISION}")


def images(name: str, split: str, data: Path | None, downloads: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) in [0, 1], float64, and labels (N,) int64.

    ``name`` is the file name in ``data`` without ``.npz``; files without splits (``lfw``) have one set under either.

    Raises:
        InvalidInput: neither ``data`` nor torchvision has it; names both ways.
        InvalidFile: the file in ``data`` is damaged or holds something else.
    """
    if data is not None and (data / f"{name}.npz").is_file():
        return _stored(data / f"{name}.npz", split)
    if name not in _TORCHVISION:
        raise _missing(f"{name}.npz", data, "create it, because no public loader has it in this form")
    try:
        found = load_images(f"torchvision:{_TORCHVISION[name]}", split=split, dtype=torch.float64, root=downloads)
    except InvalidInput as error:
        raise _missing(f"{name}.npz", data, f"install the extra {_VISION} ({str(error).rstrip('.')})") from error
    assert found.labels is not None  # these data sets have them
    return found.inputs, found.labels


def _stored(path: Path, split: str) -> tuple[Tensor, Tensor]:
    arrays = read_arrays(path, (f"x_{split}", f"y_{split}", "x", "y", "person"))
    x = arrays.get(f"x_{split}", arrays.get("x"))
    if x is None or x.dtype != np.uint8 or x.ndim not in (3, 4) or x.size == 0:
        raise InvalidFile(f"{str(path)!r} has no images x of bytes; make the file as docs/data.md says.")
    y = next((arrays[k] for k in (f"y_{split}", "y", "person") if k in arrays), np.zeros(len(x), np.int64))
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise InvalidFile(f"{str(path)!r} has no label for each image; make the file as docs/data.md says.")
    x = x if x.ndim == 4 else x[..., None]
    return torch.from_numpy(x.transpose(0, 3, 1, 2) / 255.0), torch.from_numpy(y.astype(np.int64))


def _fetched(name: str, data: Path | None, downloads: Path) -> Path:
    try:
        text = _wikitext(name) if name in _WIKITEXT else _vocabulary()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise _missing(
            name, data, f"install 'datasets' and the extra 'text' on a machine with a network ({error})"
        ) from error
    downloads.mkdir(parents=True, exist_ok=True)
    write_bytes(downloads / name, text.encode("utf-8"))
    return downloads / name


def _wikitext(name: str) -> str:
    rows = importlib.import_module("datasets").load_dataset("wikitext", "wikitext-2-v1", split=_WIKITEXT[name])
    return "".join(row["text"] for row in rows)


def _vocabulary() -> str:
    hub = importlib.import_module("huggingface_hub")
    path = hub.hf_hub_download("google-bert/bert-base-uncased", "vocab.txt")
    return Path(path).read_text(encoding="utf-8")
