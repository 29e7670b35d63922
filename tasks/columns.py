"""The columns of a data set's rows: what they hold, and whether a row does.

What they are is in `sources.DataSet`; not for files (`row_files.py`).
"""

from collections.abc import Mapping
from typing import Any

from prompt_jax import deltas
from prompt_jax.row_files import UserDataError

Row = dict[str, Any]


def described(column: tuple[str, Any]) -> str:
  """A column and what it holds, in words."""
  name, kind = column
  if isinstance(kind, dict):
    return f'{name} with {" and ".join(kind)}'
  if isinstance(kind, tuple):
    return f'{name}: {_numbered(kind)}'
  return f'{name} (a list)' if isinstance(kind, list) else name


def _numbered(texts: tuple[str, ...]) -> str:
  return ', '.join(f'{i} = {text}' for i, text in enumerate(texts))


def checked(
  columns: Mapping[str, Any], row: Row, where: str, number: int, split: str
) -> Row:
  """The columns of a row that are read, with TFDS's types; no others.

  Args:
    columns: as `sources.DataSet`.
    row: as it is.
    where: stands in front of what is wrong.
    number: `idx` of a row without one.
    split: rows of test splits need no label.

  Raises:
    UserDataError: a column is missing, or holds something else.
  """
  out = {}
  for column, kind in columns.items():
    if column in row:
      out[column] = _value(row[column], kind, f'{where}: {column}')
    elif kind is int and column == 'idx':
      out[column] = number
    elif split.startswith('test') and isinstance(kind, tuple):
      out[column] = -1  # TFDS's rows without a label
    elif split.startswith('test') and kind is float:
      out[column] = -1.0
    else:
      raise UserDataError(
        f'{where}: no column {column!r}.'
        f'{deltas.near_misses(column, list(row))} The columns: '
        f'{", ".join(row) or "none"}.'
      )
  return out


def _value(value: Any, kind: Any, where: str) -> Any:
  """A value of the kind; text of CSV files becomes numbers."""
  if isinstance(kind, tuple):
    return _label(value, kind, where)
  if isinstance(kind, list) and isinstance(value, list):
    return [_value(one, kind[0], where) for one in value]
  if isinstance(kind, dict) and isinstance(value, dict):
    missing = [key for key in kind if key not in value]
    if missing:
      raise UserDataError(f'{where} has no {missing[0]!r}: {str(value)[:60]}.')
    return {k: _value(value[k], one, where) for k, one in kind.items()}
  if kind is str and isinstance(value, str):
    return value
  if kind in (int, float) and not isinstance(value, list | dict | None):
    try:
      return kind(value)
    except ValueError:
      pass
  expected = {str: 'text', int: 'a whole number', float: 'a number'}
  wanted = 'a list' if isinstance(kind, list) else 'an object'
  wanted = expected.get(kind, wanted) if isinstance(kind, type) else wanted
  raise UserDataError(f'{where} holds {str(value)[:40]!r}, expected {wanted}.')


def _label(value: Any, texts: tuple[str, ...], where: str) -> int:
  """The number of a label; -1, of a row without one, stays."""
  text = str(value)
  if text in texts:
    return texts.index(text)
  try:
    number = int(value)
  except (TypeError, ValueError):
    number = len(texts)
  if not -1 <= number < len(texts):
    raise UserDataError(
      f'{where}: label {value!r}, expected 0 to {len(texts) - 1} or its text: '
      f'{_numbered(texts)}.{deltas.near_misses(text, texts)}'
    )
  return number
