"""Models by name: one of gradleak's, or ``module:factory`` from the user's own code."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import gradleak.models
from gradleak.errors import GradleakError, InvalidInput, InvalidModel, UnknownName

__all__ = ["Option", "check_values", "load", "load_sized", "locate", "parse_options"]

Option = bool | int | float | str


def parse_options(pairs: Iterable[str]) -> dict[str, Option]:
    """Return ``key=value`` strings as a mapping; values become bool, int or float where they read as one.

    Raises:
        InvalidInput: a pair has no ``=`` or no proper name, or a name appears twice.

    >>> parse_options(["width=24", "norm=group", "scale=1e-3", "bias=true"])
    {'width': 24, 'norm': 'group', 'scale': 0.001, 'bias': True}
    """
    options: dict[str, Option] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key.isidentifier():
            raise InvalidInput(f"The option {pair!r} is not of the form key=value; write for example width=24.")
        if key in options:
            raise InvalidInput(f"The option {key!r} is given twice; give it once.")
        options[key] = _value(value.strip())
    return options


def _value(text: str) -> Option:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        # A number that float64 cannot hold is no infinity.
        return text if math.isinf(value) and "inf" not in text.lower() else value
    return text


def load(spec: str, options: Mapping[str, Option] | None = None) -> nn.Module:
    """Return the model that ``spec`` names.

    A ``module:factory`` runs the user's own code: only name modules you trust.

    Args:
        spec: a name in ``gradleak.models.__all__``; or ``module:factory``, where the module is importable or lies in
            the current directory, or is a path to a ``.py`` file, and the factory returns (or is) an ``nn.Module``.
        options: keyword options for the factory.

    Raises:
        UnknownName: no model of that name.
        InvalidModel: the module cannot be imported, has no such factory, or the factory fails, ends the program, or
            returns no module of Python code with all of its numbers in memory (lazy, meta, scripted modules).
        InvalidInput: the factory has no such option.
    """
    options = dict(options or {})
    if ":" not in spec:
        if spec not in gradleak.models.__all__:
            raise UnknownName("model", spec, [*gradleak.models.__all__, "module:factory"])
        return _call(spec, getattr(gradleak.models, spec), options)
    with _current_directory_importable():
        return _call(spec, _find(spec), options)


def load_sized(
    spec: str, options: Mapping[str, Option], shape: tuple[int, ...], classes: int | None = None
) -> nn.Module:
    """Return the model that ``spec`` names; gradleak's own are sized to inputs of ``shape`` and to ``classes``.

    What ``options`` say of sizes counts. See :func:`load` for the rest.
    """
    options = dict(options)
    if spec in gradleak.models.__all__:
        accepted = inspect.signature(getattr(gradleak.models, spec)).parameters
        sizes: dict[str, Any] = {}
        if len(shape) == 3:
            sizes = {"in_channels": shape[0], "image_size": (shape[1], shape[2])}
        elif len(shape) == 1:
            sizes = {"in_channels": 1, "image_size": (1, shape[0])}
        if classes is not None:
            sizes["classes"] = classes
        options = {k: v for k, v in sizes.items() if k in accepted} | options
    return load(spec, options)


def locate(spec: str) -> object:
    """Return what ``module:name`` names in the user's own code, which runs; see :func:`load` for where it may lie.

    Raises:
        InvalidModel: the module cannot be imported or has no such name.
    """
    with _current_directory_importable():
        return _find(spec)


def _find(spec: str) -> object:
    module_name, _, attribute = spec.rpartition(":")
    if not module_name or not attribute:
        raise InvalidModel(f"{spec!r} names no factory; write module:factory, for example mymodels:make_net.")
    module = _import(module_name)
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            close = difflib.get_close_matches(attribute, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "name a function that it defines."
            raise InvalidModel(f"Module {module_name!r} has no factory named {attribute!r}: {hint}")
        found = getattr(found, part)
    return found


def _call(spec: str, factory: object, options: dict[str, Option]) -> nn.Module:
    if isinstance(factory, nn.Module):
        if options:
            raise InvalidInput(f"{spec!r} is a model already, so it takes no options; name its factory instead.")
        return _whole(spec, factory)
    if not callable(factory):
        raise InvalidModel(f"{spec!r} is a {type(factory).__name__}; name a function that returns an nn.Module.")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none
        signature = None
    if signature is not None:
        _check_options(spec, signature, options)
    try:
        model = factory(**options)
    except (GradleakError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit, with which a factory would end the audit as if it had succeeded
        given = f" with {', '.join(f'{k}={v}' for k, v in options.items())}" if options else ""
        raise InvalidModel(f"The factory {spec!r} failed with {_said(error)}; make it run{given} first.") from error
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"The factory {spec!r} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return _whole(spec, model)


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _whole(spec: str, model: nn.Module) -> nn.Module:
    """Return ``model`` if it is Python code and all of its numbers are in memory."""
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise InvalidModel(
            f"The model {spec!r} is or holds a scripted module, which cannot be differentiated twice; "
            "return the Python module that was scripted."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise InvalidModel(
                f"{name!r} of the model {spec!r} has no shape yet; call the model once on an input in the factory."
            )
        if tensor.is_meta:
            raise InvalidModel(
                f"{name!r} of the model {spec!r} is on the meta device and has no values; build the model on the CPU."
            )
    return model


def check_values(model: nn.Module, spec: str) -> None:
    """Check that all parameters and buffers are finite; to be called once the weights are loaded.

    Raises:
        InvalidModel: with the first that is not, and the remedy.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidModel(
                f"{name!r} of the model {spec!r} has NaN or infinite values; "
                "give the weights that were sent out, or initialize it in the factory."
            )


def _check_options(spec: str, signature: inspect.Signature, options: dict[str, Option]) -> None:
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in named:
                raise UnknownName(f"option of {spec!r}", key, named or ["(it takes none)"])
    missing = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in options]
    missing += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if missing:
        raise InvalidInput(
            f"The factory {spec!r} needs {', '.join(map(repr, missing))}; "
            f"pass it as an option ({missing[0]}=…) or give it a default."
        )


def _import(name: str) -> ModuleType:
    try:
        if name.endswith(".py"):
            return _import_file(Path(name))
        return importlib.import_module(name)
    except (GradleakError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        absent = error.name or name
        where = f" (imported by {name!r})" if absent != name and not name.startswith(f"{absent}.") else ""
        raise InvalidModel(
            f"There is no module named {absent!r}{where}; install it, or run from the folder that holds it."
        ) from error
    except BaseException as error:  # the user's own code; also SystemExit
        raise InvalidModel(
            f"Importing {name!r} failed with {_said(error)}; make `python -c 'import {name}'` work."
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidModel(f"There is no file {str(path)!r}; give the path of the file that defines it.")
    found = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if found is None or found.loader is None:
        raise InvalidModel(f"{str(path)!r} is not a Python file; give a .py file.")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Console scripts, unlike ``python -m``, do not look into the current directory."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
