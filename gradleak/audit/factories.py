"""Attacks, defenses and losses by name: one of gradleak's, or ``module:factory`` from the user's own code."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gradleak.attacks
import gradleak.defenses
from gradleak.attacks.base import Attack
from gradleak.defenses import Defense, InTurn, UpdateDefense, compose
from gradleak.errors import GradleakError, InvalidInput, UnknownName, is_memory, reason
from gradleak.models import locate, parse_options
from gradleak.models.loading import Option
from gradleak.training import Loss

__all__ = ["ChosenAttack", "build_attack", "build_defense", "find_loss"]

_LARGEST = 10**15
"""Size from which on whole numbers are slips, and overflow in the libraries below."""


@dataclass(frozen=True, eq=False)
class ChosenAttack:
    """An attack with its name and all its options, defaults included, as the record shows them."""

    attack: Attack
    name: str
    options: Mapping[str, Any]


def build_attack(name: str, options: Mapping[str, Any], budget: float | None = None) -> ChosenAttack:
    """Return the attack ``name`` of ``gradleak.attacks``, or of ``module:factory``, which runs the user's code.

    A ``budget`` in seconds is handed to a factory that takes one.

    Raises:
        InvalidInput: there is no such attack, or it does not take these options.
    """
    factory = locate(name) if ":" in name else _among(gradleak.attacks, "attack", name, "module:factory")
    if budget is not None and "budget" in _signature(name, factory).parameters:
        if "budget" in options:
            raise InvalidInput("--budget and --attack-option budget=… both limit the time; give one of them.")
        options = {**options, "budget": budget}
    built, given = _call("attack", name, factory, options)
    if not isinstance(built, Attack):
        raise InvalidInput(f"The factory {name!r} returned a {type(built).__name__}; it must return an Attack.")
    defaults = {k: p.default for k, p in _signature(name, factory).parameters.items() if p.default is not p.empty}
    return ChosenAttack(built, name, defaults | given)


def build_defense(specs: Sequence[str]) -> Defense | None:
    """Return the defenses ``NAME[:key=value,…]`` one after another, None where there are none.

    Raises:
        InvalidInput: there is no such defense, or it does not take these options.
    """
    built = []
    for spec in specs:
        name, _, rest = spec.partition(":")
        factory = _among(gradleak.defenses, "defense", name)
        defense, _ = _call("defense", name, factory, parse_options(rest.split(",") if rest else ()))
        if not isinstance(defense, Defense):
            raise InvalidInput(f"{name!r} is no defense by itself; choose one of `gradleak list defenses`.")
        built.append(defense)
    if len(built) < 2:
        return built[0] if built else None
    updates = [d for d in built if isinstance(d, UpdateDefense)]
    return compose(*updates) if len(updates) == len(built) else InTurn(tuple(built))


def find_loss(spec: str) -> Loss:
    """Return the loss ``module:callable`` of the user's own code, which runs; of a module class, an instance.

    Raises:
        InvalidModel: there is no such thing.
        InvalidInput: it cannot be called.
    """
    found = locate(spec)
    if inspect.isclass(found) and issubclass(found, nn.Module):
        found, _ = _call("loss", spec, found, {})
    if not callable(found) or inspect.isclass(found):
        raise InvalidInput(
            f"{spec!r} is a {type(found).__name__}; name a function (outputs, targets) → scalar, or a loss module."
        )
    return typing.cast("Loss", found)


def _among(package: types.ModuleType, kind: str, name: str, *more: str) -> Callable[..., Any]:
    if name not in package.__all__ or name == "compose":
        functions = [n for n in package.__all__ if not inspect.isclass(getattr(package, n)) and n != "compose"]
        raise UnknownName(kind, name, [*functions, *more])
    return typing.cast("Callable[..., Any]", getattr(package, name))


def _call(kind: str, name: str, factory: object, options: Mapping[str, Option]) -> tuple[object, dict[str, Any]]:
    """Return what the factory makes of the options, and the options in the types that it is annotated with."""
    signature = _signature(name, factory)
    try:
        hints = typing.get_type_hints(factory)
    except (NameError, TypeError, AttributeError):  # annotations of the user's own that name nothing
        hints = {}
    taken = [k for k, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = {}
    for key, value in options.items():
        if key not in taken:
            raise UnknownName(f"option of {name}", key, taken or ["(it takes none)"])
        given[key] = _convert(name, key, value, hints.get(key, Any))
        if ":" not in name and isinstance(value, (int, float)) and value < 0:  # none of gradleak's own has a use for it
            raise InvalidInput(f"Option {key!r} of {name} cannot be {value}; give a number of at least 0.")
    lacking = [k for k in taken if signature.parameters[k].default is inspect.Parameter.empty and k not in given]
    if lacking:
        raise InvalidInput(f"The {kind} {name} needs a value of {lacking[0]!r}; write for example {lacking[0]}=0.1.")
    try:
        return typing.cast("Callable[..., object]", factory)(**given), given
    except (GradleakError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's code, which may even call sys.exit()
        if is_memory(error):
            raise
        raise InvalidInput(
            f"The {kind} {name} cannot be built with {dict(options)} ({reason(error)}); correct the options."
        ) from error


def _signature(name: str, factory: object) -> inspect.Signature:
    if not callable(factory):
        raise InvalidInput(f"{name!r} is a {type(factory).__name__}; name a function that returns what is wanted.")
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):  # classes written in C tell nothing about themselves
        raise InvalidInput(f"{name!r} does not say what it takes; name a function written in Python.") from None


def _convert(owner: str, key: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type that the option is annotated with."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, str) and value.lower() == "none" and type(None) in choices:
        return None
    if torch.dtype in choices:
        if value in ("float32", "float64"):
            return getattr(torch, value)
        raise InvalidInput(f"Option {key!r} of {owner} is a number type; use float32 or float64, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput(f"Option {key!r} of {owner} cannot be {value}; give a finite number.")
    if type(value) is int and abs(value) > _LARGEST:
        raise InvalidInput(f"Option {key!r} of {owner} is too large a number; give one below {_LARGEST:.0e}.")
    if Any in choices or type(value) in choices:
        return value
    if float in choices and type(value) is int:
        return float(value)
    if str in choices:
        return str(value)
    if any(typing.get_origin(c) is typing.Literal and value in typing.get_args(c) for c in choices):
        return value
    wanted = " or ".join(getattr(c, "__name__", str(c)) for c in choices if c is not type(None))
    raise InvalidInput(f"Option {key!r} of {owner} is {wanted}, not {value!r}; give such a value.")
