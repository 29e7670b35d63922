"""What decides the result of a cell: the values of its gin files and bindings.

Not for expanding a study into cells (`plan.py`).
"""

from collections.abc import Mapping
import functools
import hashlib
import json
import pathlib
from typing import Any

from prompt_jax import gin_utils


def text(value: Any) -> str:
  """A value as gin reads it; a string that opens with '@' or '%' is gin's."""
  if isinstance(value, str) and value[:1] in ('@', '%'):
    return value
  return repr(value)


def digest(value: Any) -> str:
  """Hash of anything that is JSON, 16 letters."""
  data = json.dumps(value, sort_keys=True, default=repr)
  return hashlib.sha256(data.encode()).hexdigest()[:16]


def resolved(
  files: tuple[str, ...], bindings: Mapping[str, Any]
) -> dict[str, str]:
  """Every value of a configuration but for the task and where it is written.

  A file that a value names is there by its contents.

  Raises:
    gin_utils.GinError: it cannot be read.
  """
  return _resolved(files, tuple((k, text(v)) for k, v in bindings.items()))


@functools.cache
def _resolved(
  files: tuple[str, ...], bindings: tuple[tuple[str, str], ...]
) -> dict[str, str]:
  flags = [f'{k}={v}' for k, v in bindings]
  gin_utils.parse(files, [*flags, "MIXTURE_OR_TASK_NAME=''"])
  found = {b.key: _stable(b.value) for b in gin_utils.resolved()}
  apart = {'MODEL_DIR', 'OUTPUT'}
  if found.get('ROWS_DIR') == 'None':  # cells of studies that knew no such name
    apart |= {'ROWS_DIR', 'run.Run.rows_dir'}
  return {k: v for k, v in found.items() if k not in apart}


def _stable(value: str) -> str:
  """A value, or what is in the file that it names."""
  path = pathlib.Path(value.strip('\'"'))
  if len(value) < 4096 and '/' in value and path.is_file():
    return 'file ' + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  return value


def weight(files: tuple[str, ...], bindings: Mapping[str, Any]) -> float:
  """How long a run takes, in no unit: parameters x examples, roughly."""
  values = resolved(files, bindings)
  found = {k.split('.')[-1]: v for k, v in values.items()}

  def number(name: str) -> float:
    try:
      return float(found[name])
    except (KeyError, ValueError):
      return 1.0

  layers = number('num_encoder_layers') + number('num_decoder_layers')
  width = number('emb_dim')
  size = layers * width * (4 * width + 3 * number('mlp_dim'))
  # A step of a tiny model takes its time, too.
  size += 120_000
  return size * max(number('TRAIN_STEPS'), 20.0) * number('BATCH_SIZE')
