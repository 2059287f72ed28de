from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gradleak.data import read_rows, read_schema, table_of_frame, table_of_transformer, write_schema
from gradleak.errors import InvalidFile, InvalidInput
from gradleak.spaces import Category, Number, TableSpace

SPACE = TableSpace(
    (
        Number("age", "years", 17, 90, 40, 10, 0),
        Category("job", ("clerk", "nurse"), dropped="clerk"),
        Number("pay", std=2.0),
    ),
    Category("income", ("low", "high")),
)


@pytest.fixture
def write(tmp_path):
    def file(text: str):
        (tmp_path / "file").write_bytes(text.encode())
        return tmp_path / "file"

    return file


def test_a_schema_comes_back_as_it_was_written(tmp_path) -> None:
    write_schema(tmp_path / "schema.json", SPACE)
    assert read_schema(tmp_path / "schema.json") == SPACE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no schema"),
        ("[]", "no schema"),
        ('{"columns": [{"name": "a", "unti": "m"}]}', "'unti': did you mean 'unit'"),
        ('{"columns": [{"name": "a", "values": "abc"}]}', "values is a list"),
        ('{"columns": [{"name": "a", "values": ["x"], "coding": "onehot"}]}', "'one-hot'"),
        ('{"columns": [{"name": "a", "std": 0}]}', "std above 0"),
        ('{"columns": [{"name": "a", "std": "NaN"}]}', "finite"),
        ('{"columns": []}', "needs columns"),
    ],
)
def test_schemas_that_describe_no_table(write, text: str, said: str) -> None:
    with pytest.raises(InvalidFile, match=said):
        read_schema(write(text))


def test_rows_in_words(write) -> None:
    path = write("\ufeffjob, age (years),pay,note,income\n nurse ,30,1.5,x,low\r\nclerk,41,-2,y,high\n\n")
    rows, labels = read_rows(path, SPACE, count=2)
    assert rows.tolist() == [[30, 1, 1.5], [41, 0, -2]]
    assert labels.tolist() == [0, 1]
    numbered = TableSpace(SPACE.columns)
    assert read_rows(path, numbered)[1] is None
    assert read_rows(write("job,age,pay,label\nclerk,1,2,3\n"), numbered)[1].tolist() == [3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("age,pay\n1,2\n", "no column 'job'"),
        ("age,job,pay\n1,cook,2\n", "Line 2 .* 'cook' in column 'job', whose values are 'clerk', 'nurse'"),
        ("age,job,pay\n1,nurse,2\nold,nurse,2\n", "Line 3 .* 'old' in the numbers of 'age'"),
        ("age,job,pay\n1,nurse\n", "Line 2 .* 2 cells for 3"),
        ("age,job,pay\n", "0 rows"),
        ("age,job,pay\n1,nurse,inf\n", "Line 2"),
        ('age,job,pay\n1,"nurse,2\n', "no CSV"),
    ],
)
def test_rows_that_are_none(write, text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_rows(write(text), SPACE)


def test_the_number_of_rows_is_checked(write) -> None:
    with pytest.raises(InvalidInput, match="has 1 rows, but 2"):
        read_rows(write("age,job,pay\n1,nurse,2\n"), SPACE, count=2)


def fitted(name: str, **attributes):
    return type(name, (), attributes)()


def test_a_fitted_column_transformer() -> None:
    scaler = fitted("StandardScaler", mean_=np.array([40.0, 2.0]), scale_=np.array([10.0, 0.5]))
    ranged = fitted("MinMaxScaler", data_min_=[2.0], data_max_=[6.0], min_=[-0.5], scale_=[0.25])
    one_hot = fitted("OneHotEncoder", categories_=[np.array(["a", "b"], dtype=object)], drop_idx_=None)
    dropping = fitted("OneHotEncoder", categories_=[["x", "y"]], drop_idx_=[1])
    codes = fitted("OrdinalEncoder", categories_=[[1, 2, 3]])
    imputed = fitted("Pipeline", steps=[("fill", fitted("SimpleImputer", statistics_=[0.0])), ("scale", ranged)])
    steps = [
        ("n", scaler, ["age", "pay"]), ("m", imputed, [2]), ("c", one_hot, "job"), ("o", codes, slice(4, 5)),
        ("d", dropping, ["town"]), ("gone", "drop", ["x"]), ("remainder", "passthrough", [6]),
    ]  # fmt: skip
    names = np.array(["age", "pay", "dose", "job", "ward", "x", "rest", "town"], dtype=object)
    space = table_of_transformer(SimpleNamespace(transformers_=steps, feature_names_in_=names))
    assert space.columns == (
        Number("age", mean=40, std=10),
        Number("pay", mean=2, std=0.5),
        Number("dose", low=2, high=6, mean=2, std=4),
        Category("job", ("a", "b")),
        Category("ward", ("1", "2", "3"), one_hot=False),
        Category("town", ("x", "y"), dropped="y"),
        Number("rest"),
    )


def test_transformers_that_make_no_table() -> None:
    with pytest.raises(InvalidInput, match="fit"):
        table_of_transformer(SimpleNamespace())
    joining = fitted("OneHotEncoder", categories_=[["a", "b"]], drop_idx_=None, infrequent_categories_=[["b"]])
    for step, said in ((joining, "min_frequency"), (fitted("PCA"), "uses PCA")):
        with pytest.raises(InvalidInput, match=said):
            table_of_transformer(SimpleNamespace(transformers_=[("x", step, ["a"])], feature_names_in_=["a"]))


def test_scikit_learns_own_transformer_is_read() -> None:
    compose = pytest.importorskip("sklearn.compose", reason="scikit-learn is not installed")
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    table = np.array([[30.0, 0, 1], [50.0, 1, 1], [40.0, 2, 0]])
    steps = [("n", StandardScaler(), [0]), ("c", OneHotEncoder(drop="first"), [1]), ("o", OrdinalEncoder(), [2])]
    transformer = compose.ColumnTransformer(steps, sparse_threshold=0)
    made = transformer.fit_transform(table)
    space = table_of_transformer(transformer)
    rows = space.decode(torch.tensor(made))
    assert rows.tolist() == table.tolist()


def test_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"age": [30, 50], "pay": [1.5, 2.5], "job": ["b", "a"], "y": ["no", "yes"]})
    space = table_of_frame(frame, target="y", one_hot=False)
    assert space == TableSpace(
        (
            Number("age", low=30, high=50, mean=40, std=10, decimals=0),
            Number("pay", low=1.5, high=2.5, mean=2, std=0.5),
            Category("job", ("a", "b"), one_hot=False),
        ),
        Category("y", ("no", "yes")),
    )
    with pytest.raises(InvalidInput, match="missing values"):
        table_of_frame(pandas.DataFrame({"age": [1.0, None]}))
    with pytest.raises(InvalidInput, match="'z'"):
        table_of_frame(frame, target="z")
