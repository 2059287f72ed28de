"""Images in [0, 1]: ``.npz`` files, folders, torchvision and Hugging Face datasets, and one that is always there."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from gradleak.data.archives import is_npz, unpack_arrays
from gradleak.errors import GradleakError, InvalidFile, InvalidInput, UnknownName, clean, reason
from gradleak.files import read_file

__all__ = ["Images", "demo_image", "is_picture", "load_images"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_CACHE = Path("~/.cache/gradleak")
_PIXELS = 25_000_000
"""Most pixels of a picture; more take gigabytes before they are resized."""
_LARGE = 1_000_000
"""Pixels from which on a picture is reduced before it is resized."""
_SPARE = 4
"""Factor by which a picture may be larger than wanted, per side, before whole blocks of it are averaged."""
_UNPACKED = 1 << 26
"""Bytes that an .npz file of images may unpack to, beyond thirty-two times its own size."""
_CLASSES = 1_000_000
"""Most classes."""


@dataclass(frozen=True, eq=False)
class Images:
    """A selection of images.

    Attributes:
        inputs: (N, C, H, W) in [0, 1].
        labels: (N,) class indices, or None where the source has none.
        classes: the classes' names by index, or None.
        indices: position of each image in its source.
    """

    inputs: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    indices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.inputs.shape[0])


@dataclass(frozen=True)
class _Source:
    """A source before selection: ``read`` returns one (C, H, W) tensor in [0, 1] and its label."""

    size: int
    read: Callable[[int], tuple[Tensor, int | None]]
    classes: tuple[str, ...] | None = None


def load_images(
    spec: str | Path,
    *,
    split: str | None = None,
    count: int | None = None,
    shape: tuple[int, int, int] | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    root: str | Path | None = None,
) -> Images:
    """Return images with their labels.

    Args:
        spec: one of

            - the path of an ``.npz`` file with ``x_train``/``y_train`` and ``x_test``/``y_test``, or ``x`` and ``y``:
              images (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or floats in [0, 1]; a ``.json`` file of the same
              name may hold the class names as ``classes`` or ``class_of_index``. Pickled arrays are refused;
            - the path of a folder of image files, where subfolders are classes in alphabetical order, or of one image;
            - ``torchvision:NAME`` or ``hf:NAME``, where those packages are installed; either may download.
        split: "train" or "test" (or another split of a Hugging Face dataset). None: test where there is one, else all.
        count: number of images; None for all of them.
        shape: wanted (C, H, W): color is converted, the central part of that aspect is resized with anti-aliasing.
        seed: None takes the first ``count`` images in order, a seed takes a random selection without replacement.
        dtype: of the images.
        root: where torchvision keeps its files; ``~/.cache/gradleak/torchvision`` if None.

    Raises:
        InvalidInput: no such split, too few images, differing sizes without ``shape``, values outside [0, 1], or a
            package is not installed.
        InvalidFile: a file or folder is absent, damaged or pickled.
        UnknownName: torchvision has no dataset of that name.
    """
    if count is not None and count < 1:
        raise InvalidInput(f"There is nothing to load with count={count}; ask for at least one image.")
    if shape is not None and (len(shape) != 3 or min(shape) < 1 or shape[0] not in (1, 3)):
        raise InvalidInput(f"An image shape is (1 or 3, height, width), not {tuple(shape)}; pass three such numbers.")
    text = str(spec)
    if "\0" in text:
        raise InvalidFile(f"There is no file or folder {text!r}; check the path.")
    if text.startswith("torchvision:"):
        source = _torchvision(text.partition(":")[2], split, Path(root or _CACHE / "torchvision").expanduser())
    elif text.startswith("hf:"):
        source = _hugging_face(text.partition(":")[2], split)
    else:
        path = Path(spec)
        if path.is_dir():
            source = _folder(path, split, shape)
        elif path.suffix == ".npz":
            source = _npz(path, split)
        elif is_picture(path):
            source = _Source(1, lambda _: (_picture(path, shape), None))
        elif path.exists():
            raise InvalidInput(
                f"{text!r} is neither an .npz file nor a folder nor a picture; "
                f"convert it to one, such as {', '.join(_SUFFIXES[:3])}."
            )
        else:
            raise InvalidFile(
                f"There is no file or folder {text!r}; check the path, "
                "or write torchvision:NAME or hf:NAME for a dataset by name."
            )
    return _select(source, text, count, shape, seed, dtype)


def _select(
    source: _Source,
    spec: str,
    count: int | None,
    shape: tuple[int, int, int] | None,
    seed: int | None,
    dtype: torch.dtype,
) -> Images:
    wanted = source.size if count is None else count
    if source.size == 0:
        raise InvalidInput(f"{spec!r} has no image; name a source that has some.")
    if wanted > source.size:
        raise InvalidInput(f"{spec!r} has {source.size} images, fewer than {wanted}; ask for fewer.")
    if seed is None:
        indices = list(range(wanted))
    else:
        indices = torch.randperm(source.size, generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    images, labels = zip(*(source.read(index) for index in indices), strict=True)
    images = tuple(_fit(image, shape).to(dtype) for image in images)
    for image, index in zip(images, indices, strict=True):
        if image.shape != images[0].shape:
            raise InvalidInput(
                f"Image {index} of {spec!r} has shape {tuple(image.shape)}, but image {indices[0]} has "
                f"{tuple(images[0].shape)}; pass the shape to which all should be resized."
            )
    known = torch.tensor(labels) if all(label is not None for label in labels) else None
    return Images(torch.stack(images), known, source.classes, tuple(indices))


def _fit(image: Tensor, shape: tuple[int, int, int] | None) -> Tensor:
    """Return ``image`` (C, H, W) with the wanted channels, cropped to the aspect and resized."""
    if shape is None or tuple(image.shape) == tuple(shape):
        return image
    channels, height, width = shape
    if image.shape[0] != channels:
        # Luma of ITU-R BT.601, as image libraries convert.
        luma = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(3, 1, 1)
        image = image.expand(3, -1, -1) if channels == 3 else (image * luma).sum(0, keepdim=True)
    scale = min(image.shape[1] / height, image.shape[2] / width)
    crop = (max(1, round(height * scale)), max(1, round(width * scale)))
    top, left = (image.shape[1] - crop[0]) // 2, (image.shape[2] - crop[1]) // 2
    image = image[:, top : top + crop[0], left : left + crop[1]]
    if image.shape[1:] != (height, width):
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    return image.clamp(0, 1)


def _unit_range(values: np.ndarray[Any, Any], what: str) -> Tensor:
    """Return pixel values as float64 in [0, 1]."""
    if values.dtype == np.uint8:
        return torch.from_numpy(values.astype(np.float64)).div_(255)
    if values.dtype.kind != "f":
        raise InvalidInput(f"{what} is of type {values.dtype}; store images as uint8, or as floats in [0, 1].")
    result = torch.from_numpy(values.astype(np.float64))
    if not bool(((result >= 0) & (result <= 1)).all()):  # false for NaN, too
        low, high = float(result.min()), float(result.max())
        raise InvalidInput(
            f"{what} has values from {low:.4g} to {high:.4g}, outside [0, 1]; "
            "undo its normalization, or divide by 255 where it holds bytes."
        )
    return result


def _npz(path: Path, split: str | None) -> _Source:
    data = read_file(path)
    if not is_npz(data):
        raise InvalidFile(
            f"{str(path)!r} is no .npz file, or is truncated; save arrays of images with numpy.savez(path, x=images)."
        )
    x, y = _arrays(data, path, split)
    if len(x) and x.size == 0:
        raise InvalidInput(f"The images of {str(path)!r} have shape {x.shape}, so no pixels; save them again.")
    if y is not None and (y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu" or np.any(y > _CLASSES)):
        raise InvalidInput(
            f"The labels of {str(path)!r} are {y.dtype} of shape {y.shape} for {len(x)} images; "
            "store one class number for each image."
        )

    def read(index: int) -> tuple[Tensor, int | None]:
        return _unit_range(x[index], f"Image {index} of {str(path)!r}"), None if y is None else int(y[index])

    return _Source(len(x), read, _class_names(path.with_suffix(".json")))


def _arrays(data: bytes, path: Path, split: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    parts = {name[2:] for name in names if name in ("x_train", "x_test")}
    if split is not None and split not in parts:
        raise InvalidInput(
            f"{str(path)!r} has no split {split!r}; "
            + (f"choose one of {', '.join(sorted(parts))}." if parts else "it is one whole, so leave the split out.")
        )
    suffix = f"_{split}" if split else "_test" if "test" in parts else "_train" if parts else ""
    if split is None and "x" in names:
        suffix = ""
    if f"x{suffix}" not in names:
        raise InvalidInput(
            f"{str(path)!r} has the arrays {', '.join(sorted(names)) or '(none)'}; "
            "name the images x, or x_train and x_test."
        )
    arrays = unpack_arrays(data, path, (f"x{suffix}", f"y{suffix}"), limit=_UNPACKED + 31 * len(data))
    x, y = arrays[f"x{suffix}"], arrays.get(f"y{suffix}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InvalidInput(
            f"The images of {str(path)!r} have shape {x.shape}; store (N, H, W) or (N, H, W, C) with 1 or 3 channels."
        )
    return x, y


def _class_names(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"{str(path)!r} is not a JSON file ({error}); correct or remove it.") from error
    if not isinstance(content, dict):
        return None
    names = content.get("classes", content.get("class_of_index"))
    if isinstance(names, dict):
        if not all(key.isdecimal() and len(key) < 8 for key in names):
            return None
        size = 1 + max(map(int, names), default=-1)
        if size > _CLASSES:
            return None
        names = [names.get(str(index), str(index)) for index in range(size)]
    if not isinstance(names, list):
        return None
    return tuple(clean(name) if isinstance(name, str) else str(index) for index, name in enumerate(names))


def _folder(path: Path, split: str | None, shape: tuple[int, int, int] | None) -> _Source:
    if split is not None:
        if not (path / split).is_dir():
            raise InvalidInput(f"The folder {str(path)!r} has no split {split!r}; leave it out, or add that subfolder.")
        path = path / split
    classes = sorted(
        folder.name
        for folder in path.iterdir()
        if folder.is_dir() and not folder.name.startswith(".") and any(map(is_picture, folder.iterdir()))
    )
    loose = sorted(file for file in path.iterdir() if is_picture(file))
    if loose and classes:
        raise InvalidInput(
            f"The folder {str(path)!r} has images both in itself and in subfolders; "
            "use subfolders for classes, or none at all."
        )
    files: list[tuple[Path, int | None]] = [(file, None) for file in loose]
    for label, name in enumerate(classes):
        files += [(file, label) for file in sorted((path / name).iterdir()) if is_picture(file)]
    if not files:
        raise InvalidInput(f"The folder {str(path)!r} has no image; put {', '.join(_SUFFIXES[:3])} files into it.")

    def read(index: int) -> tuple[Tensor, int | None]:
        file, label = files[index]
        return _picture(file, shape), label

    return _Source(len(files), read, tuple(map(clean, classes)) or None)


def _picture(file: Path, shape: tuple[int, int, int] | None) -> Tensor:
    data = read_file(file, limit=_PIXELS * 4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of a damaged or large picture is decided here
            with Image.open(io.BytesIO(data)) as image:
                return _pixels(image, f"Image {str(file)!r}", shape)
    except GradleakError:
        raise
    except Exception as error:  # a hostile picture can make its decoder fail in any way
        raise InvalidFile(f"{str(file)!r} cannot be read as an image; save it again, or remove it.") from error


def is_picture(file: Path) -> bool:
    """Return whether ``file`` is there and has the name of a picture; hidden files have not."""
    return file.suffix.lower() in _SUFFIXES and file.is_file() and not file.name.startswith(".")


def _pixels(image: Image.Image, what: str, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Return a picture as (C, H, W) in [0, 1]: one channel if it is gray, else three.

    A picture far larger than ``shape`` (C, H, W) is first reduced to averages of whole blocks.
    """
    width, height = image.size  # as its header says; nothing is decoded yet
    if width * height > _PIXELS:
        raise InvalidFile(f"{what} has {width} × {height} pixels; resize it to at most {_PIXELS // 10**6} million.")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise InvalidInput(f"{what} has more than 8 bits per channel; convert it to an 8-bit PNG.")
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    ImageOps.exif_transpose(image, in_place=True)
    upright = image if image.mode == mode else image.convert(mode)
    if shape is not None:
        blocks = min(upright.height // (_SPARE * shape[1]), upright.width // (_SPARE * shape[2]))
        upright = upright.reduce(blocks) if blocks > 1 and width * height > _LARGE else upright
    array = np.asarray(upright)
    if array.size == 0:
        raise InvalidFile(f"{what} has no pixels; save it again, or remove it.")
    return _unit_range(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), what)


def _item_pixels(item: object, what: str) -> Tensor:
    if isinstance(item, Image.Image):
        return _pixels(item, what)
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in (1, 3):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise InvalidInput(f"{what} has shape {array.shape}; choose a dataset of gray or RGB images.")
    return _unit_range(np.ascontiguousarray(array), what)


def _optional(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"This dataset needs the package {(error.name or package)!r}; "
            f"install it with pip install 'gradleak[{extra}]'."
        ) from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise InvalidInput(
            f"The package {package!r} is installed but cannot be imported ({reason(error)}); "
            "install the build of it that fits this PyTorch."
        ) from error


def _torchvision(name: str, split: str | None, root: Path) -> _Source:
    module = _optional("torchvision.datasets", "vision")
    names = [n for n in getattr(module, "__all__", ()) if inspect.isclass(getattr(module, n, None))]
    if name not in names:
        raise UnknownName("torchvision dataset", name, names)
    factory = getattr(module, name)
    accepted = inspect.signature(factory).parameters
    wanted = split or "test"
    options: dict[str, Any] = {}
    if "root" in accepted:
        options["root"] = str(root)
    if "train" in accepted:
        if wanted not in ("train", "test"):
            raise InvalidInput(f"torchvision's {name} has no split {wanted!r}; choose train or test.")
        options["train"] = wanted == "train"
    elif "split" in accepted:
        options["split"] = wanted
    elif split is not None:
        raise InvalidInput(f"torchvision's {name} is one whole; leave the split out.")
    if "download" in accepted:
        options["download"] = True
    dataset = _fetched(lambda: factory(**options), f"torchvision's {name}")
    classes = getattr(dataset, "classes", None)

    def read(index: int) -> tuple[Tensor, int | None]:
        image, label = dataset[index][:2]
        return _item_pixels(image, f"Image {index} of torchvision's {name}"), _label(label)

    return _Source(len(dataset), read, tuple(map(str, classes)) if classes else None)


def _hugging_face(name: str, split: str | None) -> _Source:
    module = _optional("datasets", "datasets")
    if split is None:
        available = list(_fetched(lambda: module.get_dataset_split_names(name), f"the dataset {name!r}"))
        split = "test" if "test" in available else available[0]
    dataset = _fetched(lambda: module.load_dataset(name, split=split), f"the dataset {name!r}")
    features = dataset.features
    pictures = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
    if not pictures:
        raise InvalidInput(f"The dataset {name!r} has no image column; its columns are {', '.join(features)}.")
    labels = [key for key, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    # Of several label columns (fine and coarse) the finest is the one with the most classes.
    column = max(labels, key=lambda key: len(features[key].names), default=None)

    def read(index: int) -> tuple[Tensor, int | None]:
        row = dataset[index]
        image = _item_pixels(row[pictures[0]], f"Image {index} of the dataset {name!r}")
        return image, None if column is None else _label(row[column])

    return _Source(len(dataset), read, tuple(features[column].names) if column else None)


def _fetched(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except Exception as error:  # other packages' downloads fail in their own ways
        raise InvalidInput(
            f"{what[0].upper()}{what[1:]} could not be loaded ({type(error).__name__}: {reason(error)}); "
            "check the name, the split and the network, or pass the path of an .npz file."
        ) from error


def _label(value: object) -> int | None:
    if isinstance(value, Tensor | np.generic) and getattr(value, "ndim", 0) == 0:
        value = value.item()
    return value if isinstance(value, int) else None


def demo_image(size: int = 32) -> Tensor:
    """Return a real photograph that ships with scikit-image, (1, 3, size, size) in [0, 1], float32.

    It is "Chelsea" the cat (CC0, by Stéfan van der Walt), the central square; nothing is downloaded.

    Raises:
        InvalidInput: the size is not positive.
        InvalidFile: scikit-image is installed without its pictures.
    """
    if size < 1:
        raise InvalidInput(f"An image cannot have {size} pixels a side; ask for at least one.")
    picture = importlib.resources.files("skimage") / "data" / "chelsea.png"
    try:
        with picture.open("rb") as file, Image.open(file) as image:
            pixels = _pixels(image, "The photograph")
    except (OSError, ModuleNotFoundError) as error:
        raise InvalidFile(
            "scikit-image is installed without its photograph chelsea.png; reinstall it with pip install scikit-image."
        ) from error
    return _fit(pixels, (3, size, size))[None].to(torch.float32)
