"""`prompt-jax recycle`: prompts of one model as those of another, in files.

The maps are in `methods/recycling.py`. What is written is where a prompt of the
other model starts, in training or, as it is, in evaluation.
"""

from collections.abc import Mapping, Sequence
import inspect
import pathlib
from typing import Any

from absl import logging
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import convert
from prompt_jax import deltas
from prompt_jax import fingerprints
from prompt_jax import paths
from prompt_jax import vocabularies
from prompt_jax.methods import recycling
from prompt_jax.methods import saved_prompts

_EMBEDDING = 'token_embedder/embedding'


def recycle(
  source: str,
  target: str,
  prompt: str | Sequence[str],
  output: str,
  method: str = 'v2v-lin',
  words: str | Sequence[int] | None = None,
  num_words: int = 4000,
  offset: int = 1000,
  vocabulary_path: str | None = None,
  **options: Any,
) -> recycling.Prompt | list[recycling.Prompt]:
  """Writes prompts of the model `source` as those of the model `target`.

  Args:
    source: base checkpoint that the prompts were trained on.
    target: base checkpoint that they are for; both have one vocabulary.
    prompt: file or run, as `saved_prompts.read` takes it; or several.
    output: `.npy`, for `initializers.FromFile`; of several prompts a folder for
      a `.npy` each, called as the run or the file.
    method: a name of `recycling.METHODS`.
    words: a JSON file for `recycling.word_list`, or ids; None for all rows.
    num_words: of a file or a vocabulary.
    offset: words of a file or a vocabulary to skip.
    vocabulary_path: SentencePiece model, whose `recycling.latin_words` are the
      words.
    **options: of `recycling.v2v_nn`.

  Returns:
    What was written, [P, D_t] or, of several tasks, [G, P, D_t]; a list of
    several prompts.

  Raises:
    ValueError: no such method, options of another one, words given twice, two
      prompts of one name, a prompt of another base than `source`, a checkpoint
      without a token embedding, or arrays that do not fit.
    CheckpointError: a file is not there or not whole.
  """
  _check_method(method, options)
  names = [prompt] if isinstance(prompt, str) else list(prompt)
  files = _outputs(names, output)
  saved = [saved_prompts.read(name) for name in names]
  tables = [_embedding(path) for path in (source, target)]
  for one in saved:
    _check_source(one, source, tables[0])
  ids = _ids(words, num_words, offset, vocabulary_path)
  logging.info('%d words.', len(tables[0]) if ids is None else len(ids))
  rows = [x.prompts.reshape(-1, x.prompts.shape[-1]) for x in saved]
  # Each row is mapped by itself, so that one map does for all.
  mapped = recycling.METHODS[method](
    *tables, np.concatenate(rows), words=ids, **options
  )
  ends = np.cumsum([len(x) for x in rows])[:-1]
  out = []
  for one, own, file in zip(saved, np.split(mapped, ends), files, strict=True):
    groups, length, _ = one.prompts.shape
    shape = (groups, length, -1) if groups > 1 else (length, -1)
    out.append(own.reshape(shape))
    saved_prompts.write(file, out[-1])
    before, after = (
      float(np.linalg.norm(x, axis=-1).mean()) for x in (one.prompts, own)
    )
    print(
      f'Wrote {file}: {method} of {one.path}, shape {out[-1].shape}, mean norm '
      f'of a row {after:.4g} (before: {before:.4g}).'
    )
  return out if len(out) > 1 else out[0]


def _ids(
  words: str | Sequence[int] | None,
  num_words: int,
  offset: int,
  vocabulary_path: str | None,
) -> Any:
  if vocabulary_path is not None:
    if words is not None:
      raise ValueError('Give words, or a vocabulary to take them of, not both.')
    vocabulary = vocabularies.sentencepiece(vocabulary_path)
    return recycling.latin_words(vocabulary, num_words, offset)
  if isinstance(words, str):
    return recycling.word_list(words, num_words, offset)
  return words


def _check_method(method: str, options: Mapping[str, Any]) -> None:
  if method not in recycling.METHODS:
    raise ValueError(
      f'The method must be one of {", ".join(recycling.METHODS)}, got '
      f'{method!r}.{deltas.near_misses(str(method), recycling.METHODS)}'
    )
  parameters = inspect.signature(recycling.METHODS[method]).parameters.values()
  known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  if options and not known:
    raise ValueError(f'{method} has no options, got {sorted(options)}.')
  for name in options:
    if name not in known:
      raise ValueError(
        f'{method} has no option {name!r}; there are {", ".join(known)}.'
        f'{deltas.near_misses(name, known)}'
      )


def _outputs(names: Sequence[str], output: str) -> list[str]:
  """A file for each prompt, in a folder that is there."""
  path = pathlib.Path(output)
  if not names:
    raise ValueError('Give a prompt to recycle.')
  if len(names) == 1:
    if path.suffix != '.npy':
      raise ValueError(f'A prompt is written as .npy, got {output!r}.')
    checkpoints.check_writable(str(path.parent))
    return [output]
  if path.suffix == '.npy':
    raise ValueError(
      f'Several prompts are written to a folder, got {output!r}.'
    )
  stems = []
  for name in names:
    named = pathlib.Path(name)
    if named.name == saved_prompts.FILE:  # of a run
      named = named.parent
    stems.append(named.resolve().name if named.is_dir() else named.stem)
  twice = sorted({stem for stem in stems if stems.count(stem) > 1})
  if twice:
    raise ValueError(
      f'Several prompts are called {", ".join(twice)}: recycle them one by one.'
    )
  checkpoints.check_writable(output)
  return [str(path / f'{stem}.npy') for stem in stems]


def _check_source(
  saved: saved_prompts.SavedPrompts, source: str, table: recycling.Embedding
) -> None:
  """Refuses a prompt of another width, or that names another embedding."""
  width = saved.prompts.shape[-1]
  if width != table.shape[-1]:
    raise ValueError(
      f'{saved.path}: a prompt of width {width}, but {source} embeds words in '
      f'{table.shape[-1]} dimensions: it was trained on another base.'
    )
  trained = saved.origin.get('embedding')
  [here] = fingerprints.fingerprint({_EMBEDDING: table}).values()
  if trained is not None and trained != here:
    raise ValueError(
      f'{saved.path} was trained on another base than {source}: the embedding '
      f'there is {trained}, here {here} (shape:checksum). Give the base of '
      'that run as the source.'
    )


def _embedding(path: str) -> np.ndarray:
  if '://' not in path and not pathlib.Path(path).expanduser().exists():
    raise convert.CheckpointError(
      f'No base checkpoint {path!r}.{paths.near(path)}'
    )
  leaves = convert.open_checkpoint(path).leaves
  if _EMBEDDING not in leaves:
    raise ValueError(
      f'{path} has no {_EMBEDDING!r}.{deltas.near_misses(_EMBEDDING, leaves)}'
    )
  return np.asarray(leaves[_EMBEDDING].array(), np.float32)
