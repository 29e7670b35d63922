"""Rows of JSON lines, CSV and TSV files, with errors that name the line.

All files are UTF-8. CSV and TSV start with the names of their columns; TSV has
no quotes. Not for making tasks of the rows: `user_data.py`.
"""

from collections.abc import Iterator
import csv
import difflib
import io
import json
import pathlib
from typing import Any

Row = dict[str, Any]
_DELIMITERS = {'.csv': ',', '.tsv': '\t'}
_SUFFIXES = ('.jsonl', *_DELIMITERS)


class UserDataError(ValueError):
  """Something is wrong with a user's file, row or template."""


def read_rows(path: str | pathlib.Path) -> Iterator[tuple[int, Row]]:
  """The rows of a .jsonl, .csv or .tsv file, with their line numbers from 1.

  Raises:
    UserDataError: the file cannot be read, or its header is wrong.
  """
  for line, row in rows_and_errors(pathlib.Path(path)):
    if isinstance(row, UserDataError):
      raise row
    yield line, row


def rows_and_errors(
  path: pathlib.Path,
) -> Iterator[tuple[int, Row | UserDataError]]:
  """Rows, and in place of a bad row what is wrong with it."""
  if path.suffix not in _SUFFIXES:
    raise UserDataError(
      f'{path}: cannot tell the format from {path.suffix!r}; use one of '
      f'{", ".join(_SUFFIXES)}.'
    )
  text = _text(path)
  if path.suffix == '.jsonl':
    yield from _json_rows(path, text)
  else:
    yield from _table_rows(path, text)


def _text(path: pathlib.Path) -> str:
  if not path.is_file():
    near = difflib.get_close_matches(
      path.name,
      [other.name for other in path.parent.glob('*')] if path.parent.is_dir()
      else [],
    )  # fmt: skip
    hint = f' Did you mean {" or ".join(near)}?' if near else ''
    raise UserDataError(f'{path}: there is no such file.{hint}')
  content = path.read_bytes()
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise UserDataError(
      f'{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); '
      'save the file as UTF-8.'
    ) from error
  if not text.strip():
    raise UserDataError(f'{path}: the file is empty.')
  return text


def _json_rows(
  path: pathlib.Path, text: str
) -> Iterator[tuple[int, Row | UserDataError]]:
  # Not splitlines: U+2028 may stand in a JSON string.
  for line, content in enumerate(text.split('\n'), start=1):
    if not content.strip():
      continue
    try:
      row = json.loads(content)
    except json.JSONDecodeError as error:
      yield (
        line,
        UserDataError(
          f'{path}, line {line}: not JSON: {error.msg} at column {error.colno}.'
        ),
      )
      continue
    if isinstance(row, dict):
      yield line, row
    else:
      yield (
        line,
        UserDataError(
          f'{path}, line {line}: expected an object such as {{"text": "..."}}, '
          f'got {content.strip()[:40]}'
        ),
      )


def _table_rows(
  path: pathlib.Path, text: str
) -> Iterator[tuple[int, Row | UserDataError]]:
  delimiter = _DELIMITERS[path.suffix]
  quoting = csv.QUOTE_MINIMAL if delimiter == ',' else csv.QUOTE_NONE
  reader = csv.reader(
    io.StringIO(text, newline=''),
    delimiter=delimiter, quoting=quoting, strict=True,
  )  # fmt: skip
  header: list[str] = []
  line = 1
  while True:
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      # A quote that nobody closed swallows the rest: there is no next row.
      raise UserDataError(
        f'{path}, line {line}: {error}. Is a quote not closed?'
      ) from error
    start, line = line, reader.line_num + 1
    if not fields:
      continue
    if not header:
      header = _checked_header(path, fields)
    elif len(fields) != len(header):
      yield (
        start,
        UserDataError(
          f'{path}, line {start}: {len(fields)} columns, but the header has '
          f'{len(header)}: {", ".join(header)}. Text with a '
          + ('comma needs "quotes".' if delimiter == ',' else 'tab needs JSON.')
        ),
      )
    else:
      yield start, dict(zip(header, fields, strict=True))


def _checked_header(path: pathlib.Path, header: list[str]) -> list[str]:
  twice = [name for name in header if header.count(name) > 1]
  if twice or '' in header:
    problem = f'{twice[0]!r} twice' if twice else 'a column without a name'
    raise UserDataError(
      f'{path}, line 1: the header has {problem}: {", ".join(header)}.'
    )
  return header
