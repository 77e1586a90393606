"""Tables of further columns, joined to the particles."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError


def join(table: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    """`table` with the columns of `extra`, matched by `uid` (column or index), else by the order of rows."""
    if "uid" in extra.columns:
        extra = extra.set_index(pd.Index(uids(extra["uid"]), name="uid")).drop(columns="uid")
    by_uid = extra.index.name == "uid"
    clash = [str(name) for name in extra.columns if name in table.columns]
    if clash:
        raise UserError(
            f"the table has columns that the particles have already: {', '.join(clash)}; rename them"
        )
    if by_uid:
        if extra.index.has_duplicates:
            raise UserError(f"the table names uid {extra.index[extra.index.duplicated()][0]} twice")
        extra = extra.reindex(table.index)
        if len(extra.columns) and extra.isna().all(axis=None):
            raise UserError("none of the table's uids is one of the particles")
    elif len(extra) != len(table):
        raise UserError(
            f"the table has {len(extra)} rows and no uid column, but there are {len(table)} particles"
        )
    else:
        extra = extra.set_index(table.index)
    return pd.concat([table, extra], axis=1)


def uids(column: pd.Series) -> NDArray[np.uint64]:
    """The uids of a table; `UserError` with its row for what is none."""
    if column.dtype.kind == "u":
        return column.to_numpy(np.uint64)
    found = np.empty(len(column), np.uint64)
    for row, value in enumerate(column.tolist()):
        try:
            number = int(value)
            if isinstance(value, float) and number != value:
                raise ValueError
            found[row] = number
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"row {row + 1} of the table has the uid {value!r}; a uid is a whole number, as in"
                " particles.parquet of the session"
            ) from None
    return found


def read_table(path: Path, n: int) -> pd.DataFrame:
    """A table to `join` to `n` particles: .csv, .tsv, .parquet, .npy or .npz.

    Arrays of two dimensions become columns NAME_0, NAME_1, …; of an .npz, the arrays with `n` rows are taken.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return pd.read_csv(path, sep="," if suffix == ".csv" else "\t")
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix not in (".npy", ".npz"):
            raise UserError(f"{path} is no table; give a .csv, .tsv, .parquet, .npy or .npz file")
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            arrays = {path.stem: found} if suffix == ".npy" else dict(found)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
    columns: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if array.dtype.names and array.ndim == 1:
            columns |= {field: array[field] for field in array.dtype.names}
        elif array.ndim == 2 and (len(array) == n or suffix == ".npy"):
            columns |= {f"{name}_{i}": array[:, i] for i in range(array.shape[1])}
        elif array.ndim == 1 and (len(array) == n or suffix == ".npy"):
            columns[name] = array
    if not columns:
        raise UserError(f"{path} holds no array with one row for each of the {n} particles")
    return pd.DataFrame(columns)
