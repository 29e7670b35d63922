"""Paths in error messages."""

import os
import pathlib

from prompt_jax import deltas


def near(path: str | os.PathLike[str]) -> str:
  """' Did you mean ...?' of what lies beside a path that is not there.

  Beside the first of its folders that is missing; empty if nothing is near.
  """
  missing = pathlib.Path(path)
  while not missing.parent.is_dir() and missing != missing.parent:
    missing = missing.parent
  if not missing.parent.is_dir():
    return ''
  beside = sorted(entry.name for entry in missing.parent.iterdir())
  return deltas.near_misses(missing.name, beside)
