"""Prompts in files: those of runs, of exports, and `.npy`.

Not for arrays that are no prompts, or stand beside others: a method reads its
own. `sources.py` compares what files say of their base with the run's.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import io
import json
import pathlib

from jaxtyping import Float
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import paths

FILE = 'trainable.safetensors'
_PROMPT = 'method/prompt'
_ROWS = '/rows/table'
_EMBEDDING = 'token_embedder/embedding'


@dataclasses.dataclass(frozen=True)
class SavedPrompts:
  """The prompts of a file.

  Attributes:
    path: of the file.
    prompts: float32 [G, P, D]; G is 1 but for a method with `num_tasks`.
    origin: 'base_digest' and 'vocabulary' of the run, and the checksum of its
      base's 'embedding', as far as the file says.
  """

  path: str
  prompts: Float[np.ndarray, 'G P D']
  origin: Mapping[str, str]


def read(path: str) -> SavedPrompts:
  """The prompts of a file, or of the directory of a run or an export.

  Args:
    path: `.npy` with [P, D] or [G, P, D]; `trainable.safetensors` of a soft
      prompt; or what `prompt-jax export` wrote of any method that makes
      prompts. Of a directory, the `trainable.safetensors` in it.

  Raises:
    CheckpointError: no such file, or not a whole one.
    ValueError: it holds no prompts, more than prompts, or parameters that are
      still to be made into prompts.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    file = file / FILE
  if not file.is_file():
    raise checkpoints.CheckpointError(
      f'No file {str(file)!r}.{paths.near(file)}'
    )
  # Methods ask for their size again and again; a file may be written anew.
  return _read(path, file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=128)
def _read(path: str, file: pathlib.Path, changed: int) -> SavedPrompts:
  del changed
  if file.suffix != '.npy':
    flat, header = checkpoints.load_trainable(str(file))
    name = _name(str(file), list(flat), header)
    origin = {
      k: header[k] for k in ('base_digest', 'vocabulary') if k in header
    }
    base = json.loads(header.get('base', '{}'))
    if _EMBEDDING in base:
      origin['embedding'] = base[_EMBEDDING]
    return SavedPrompts(path, _stacked(path, flat[name], header), origin)
  try:
    found = np.load(file, allow_pickle=False)
  except (ValueError, EOFError, OSError) as e:
    raise ValueError(f'{path}: not a numpy array file: {e}') from e
  return SavedPrompts(path, _stacked(path, found, {}), {})


def _name(file: str, names: list[str], header: Mapping[str, str]) -> str:
  """Of the one array that holds prompts, in a file with nothing else."""
  exported = 'exported' in header
  found = [
    n for n in names if (n.endswith(_ROWS) if exported else n == _PROMPT)
  ]
  if len(found) == 1 == len(names):
    return found[0]
  if not found:
    raise ValueError(f'{file}: no prompts; there are {sorted(names)}.')
  raise ValueError(
    f'{file} holds more than prompts: {sorted(set(names) - set(found))}. If '
    'prompts are made of that, write them by `prompt-jax export '
    '--model_dir=RUN --output=DIR`, and give DIR.'
  )


def _stacked(
  path: str, x: np.ndarray, header: Mapping[str, str]
) -> Float[np.ndarray, 'G P D']:
  if 'exported' in header:  # [1, G P, D]
    groups = json.loads(header['exported'])['soft_tokens'][0]
    x = x.reshape(groups, -1, x.shape[-1])
  if x.ndim not in (2, 3):
    raise ValueError(
      f'{path}: prompts have shape {x.shape}, expected [P, D] (prompt length, '
      'emb_dim of the network) or, of several tasks, [G, P, D].'
    )
  return np.asarray(x, np.float32).reshape(-1, *x.shape[-2:])


def check_alike(found: Sequence[SavedPrompts]) -> None:
  """Checks that prompts may stand together: one shape, base and vocabulary.

  Raises:
    ValueError: two differ; both are named.
  """
  first = found[0]
  for other in found[1:]:
    shape, wanted = other.prompts.shape[1:], first.prompts.shape[1:]
    if shape != wanted:
      raise ValueError(
        f'{other.path}: a prompt has shape {shape}, but in {first.path} '
        f'{wanted}; they must be equal.'
      )
    check_same_base(other, first)


def check_same_base(other: SavedPrompts, first: SavedPrompts) -> None:
  """Checks that prompts are of one base and vocabulary, as far as files say.

  Raises:
    ValueError: they are not.
  """
  for key, name in (('base_digest', 'base'), ('vocabulary', 'vocabulary')):
    mine, its = first.origin.get(key), other.origin.get(key)
    if None not in (mine, its) and mine != its:
      raise ValueError(
        f'{other.path} was trained with another {name} ({its}) than '
        f'{first.path} ({mine}): their prompts do not mean the same.'
      )


def write(path: str, prompts: Float[np.ndarray, '*G P D']) -> None:
  """Writes one prompt [P, D], or those of several tasks, as `.npy`.

  `initializers.FromFile` reads it.

  Raises:
    ValueError: another suffix.
    CheckpointError: the file cannot be written.
  """
  if pathlib.Path(path).suffix != '.npy':
    raise ValueError(f'A prompt is written as .npy, got {path!r}.')
  data = io.BytesIO()
  np.save(data, np.asarray(prompts, np.float32))
  checkpoints.write_atomically(pathlib.Path(path), data.getvalue())
