from __future__ import annotations

import math
import sys

import pytest
import torch

import gradleak.models as models
from gradleak.errors import InvalidInput, InvalidModel, UnknownName
from gradleak.models import load, parse_options
from gradleak.models.loading import check_values

SOURCE = """
import warnings
import torch
from torch import nn
from gradleak.errors import InvalidInput

def net(width, depth=2, *, bias=True):
    return nn.Linear(width, depth, bias=bias)

def anything(**options):
    return nn.Linear(int(options.get("width", 3)), 1)

def fails():
    raise RuntimeError("weights are missing")

def refuses():
    raise InvalidInput("No.")

def positional(size, /):
    return nn.Linear(size, 1)

def number():
    return 3

def leaves():
    raise SystemExit(0)

class Odd(BaseException):
    pass

def odd():
    raise Odd("\x1b[2J")

def cancelled():
    raise KeyboardInterrupt

def lazy():
    return nn.Sequential(nn.LazyLinear(3))

def meta():
    return nn.Linear(2, 3, device="meta")

def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.trace(nn.Linear(2, 3), torch.zeros(1, 2)))

def unset(value="nan"):
    net = nn.BatchNorm1d(3)
    net.running_mean[1] = float(value)
    return net

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

ready = nn.Linear(2, 2)
constant = 5
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "usermodels.py").write_text(SOURCE)
    (tmp_path / "broken_models.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "crashing_models.py").write_text("1 / 0\n")
    (tmp_path / "leaving_models.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "misspelled_models.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    names = ("usermodels", "broken_models", "crashing_models", "leaving_models", "misspelled_models")
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def test_own_models_by_name():
    model = load("lenet", {"width": 24, "classes": 10, "seed": 3})
    assert model.body[0].weight.shape[0] == 24
    assert torch.equal(model.fc[0].weight, models.lenet(width=24, classes=10, seed=3).fc[0].weight)


def test_unknown_name_suggests():
    with pytest.raises(UnknownName, match="did you mean 'lenet'"):
        load("leenet")


def test_unknown_option_suggests():
    with pytest.raises(UnknownName, match="did you mean 'width'"):
        load("lenet", {"widht": 3})


def test_factory_in_the_current_directory(user):
    before = list(sys.path)
    assert load("usermodels:net", {"width": 5, "bias": False}).weight.shape == (2, 5)
    assert load("usermodels:Net").weight.shape == (2, 4)
    assert load("usermodels:anything", {"width": 9}).weight.shape == (1, 9)
    assert load("usermodels:ready") is load("usermodels:ready")
    assert sys.path == before


def test_factory_in_a_file(user, tmp_path):
    assert load(f"{tmp_path}/usermodels.py:net", {"width": 3}).weight.shape == (2, 3)
    with pytest.raises(InvalidModel, match="no file"):
        load("absent.py:net")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("usermodels:nett", "did you mean 'net'"),
        ("usermodels:fails", "RuntimeError: weights are missing"),
        ("usermodels:leaves", "failed with SystemExit: 0; make it run"),
        ("usermodels:odd", r"failed with Odd: \\x1b\[2J; make it run"),
        ("usermodels:lazy", "no shape yet; call the model once"),
        ("usermodels:meta", "on the meta device and has no values; build"),
        ("usermodels:scripted", "return the Python module that was scripted"),
        ("leaving_models:net", "failed with SystemExit; make"),
        ("usermodels:number", "returned a int"),
        ("usermodels:constant", "is a int"),
        ("no_such_module_here:net", "no module named 'no_such_module_here'"),
        ("no_such_module_here.sub:net", "no module named 'no_such_module_here'"),
        ("broken_models:net", "'no_such_package_at_all' .imported by 'broken_models'."),
        ("crashing_models:net", "ZeroDivisionError"),
        ("misspelled_models:net", "SyntaxError"),
        (":net", "module:factory"),
        ("usermodels:", "module:factory"),
    ],
)
def test_invalid_models(user, spec, message):
    with pytest.raises(InvalidModel, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_ctrl_c_in_a_factory_is_no_failure_of_it(user):
    with pytest.raises(KeyboardInterrupt):
        load("usermodels:cancelled")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_are_checked_once_the_weights_are_there(user, value):
    model = load("usermodels:unset", {"value": value})
    with pytest.raises(InvalidModel, match=r"'running_mean' of the model 'usermodels:unset' has NaN"):
        check_values(model, "usermodels:unset")
    model.running_mean.zero_()
    check_values(model, "usermodels:unset")


def test_options_are_checked(user):
    with pytest.raises(InvalidInput, match="needs 'width'"):
        load("usermodels:net")
    with pytest.raises(InvalidInput, match="needs 'size'"):
        load("usermodels:positional")
    with pytest.raises(UnknownName, match="did you mean 'depth'"):
        load("usermodels:net", {"width": 3, "deph": 3})
    with pytest.raises(InvalidInput, match="takes no options"):
        load("usermodels:ready", {"width": 3})
    with pytest.raises(InvalidInput, match=r"^No\.$"):
        load("usermodels:refuses")


def test_parse_options():
    parsed = parse_options(["a=1", "b=-2.5", "c=True", "d=relu", "e=1e-3", "f=x=y", "in-channels=3", "g="])
    assert parsed == {"a": 1, "b": -2.5, "c": True, "d": "relu", "e": 1e-3, "f": "x=y", "in_channels": 3, "g": ""}
    assert parse_options(["a=inf", "b=1e400", "c=" + "9" * 5000]) == {"a": math.inf, "b": "1e400", "c": "9" * 5000}
    assert type(parsed["a"]) is int
    assert type(parsed["c"]) is bool


@pytest.mark.parametrize("pairs", [["width"], ["=3"], ["two words=3"], ["a=1", "a=2"]])
def test_parse_options_refuses(pairs):
    with pytest.raises(InvalidInput):
        parse_options(pairs)


def test_catalog_is_what_is_exported():
    assert sorted(models.__all__) == models.__all__
    assert all(isinstance(load(name, {"width": 4}), torch.nn.Module) for name in models.__all__)
