"""What a method is made of: files of other runs, of the same base?

Prompts, subspaces and chosen units mean nothing on another base or with another
vocabulary. Whatever reads such files, a method or an initial value in it, lists
them in a property `source_files`; `Run.load` compares all of them with the run.
Not for what a run has trained itself (`Run.load_trainable`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from prompt_jax import checkpoints
from prompt_jax import fingerprints
from prompt_jax.methods import saved_prompts

_ADVICE = (
  'Give the INITIAL_CHECKPOINT_PATH and the model file that the file was made '
  'with, or a file that was made on the base of this run.'
)


def files(method: Any) -> list[str]:
  """The `source_files` of a method and of all in its fields, each once."""
  found = dict.fromkeys(getattr(method, 'source_files', ()))
  if isinstance(method, Mapping):
    parts = list(method.values())
  elif isinstance(method, Sequence) and not isinstance(method, str):
    parts = list(method)
  elif dataclasses.is_dataclass(method):
    names = (f.name for f in dataclasses.fields(method))
    parts = [getattr(method, n, None) for n in names if n != 'parent']
  else:
    parts = []
  for part in parts:
    found |= dict.fromkeys(files(part))
  return list(found)


def check(
  paths: Sequence[str], base: fingerprints.Fingerprint, vocabulary: str
) -> None:
  """Refuses files of another base or vocabulary, as far as their headers say.

  A `.npy` has no header; of a file that is not there its reader tells.

  Args:
    paths: of files, or of directories of runs or exports.
    base: fingerprint of the base that has been loaded.
    vocabulary: fingerprint of the vocabulary here.

  Raises:
    CheckpointError: another vocabulary, or a file that is not whole.
    fingerprints.BaseMismatch: another base.
  """
  for path in paths:
    file = pathlib.Path(path)
    file = file / saved_prompts.FILE if file.is_dir() else file
    if file.suffix == '.npy' or not file.is_file():
      continue
    header = checkpoints.load_header(str(file))
    made_with = {
      'base': json.loads(header.get('base', 'null')),
      'vocabulary': header.get('vocabulary'),
    }
    where = f'{path}, which METHOD reads,'
    checkpoints.check_origin(made_with, where, base, vocabulary, _ADVICE)
    said, here = header.get('base_digest'), fingerprints.digest(base)
    if said not in (None, here):
      raise fingerprints.BaseMismatch(
        f'{where} was made on another frozen base (fingerprint {said}; the '
        f'base loaded here is {here}).\n{_ADVICE}'
      )
