"""Initial values of soft prompts.

An initializer is called as `init(rng, shape, embedding)` with shape [P, D] and
the frozen token embedding [V, D].  Source: Lester et al. 2021, arXiv
2104.08691, section 3.2; checked against google-research/prompt-tuning
`prompt_tuning/prompts.py`.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax.methods import saved_prompts

PromptInitializer = Callable[[Any, Sequence[int], Any], Any]


@dataclasses.dataclass(frozen=True)
class RandomUniform:
  """Uniform in [minval, maxval).

  The paper says [-0.5, 0.5); the released configuration draws from [0, 0.5).
  """

  minval: float = -0.5
  maxval: float = 0.5

  def __post_init__(self):
    if not self.minval < self.maxval:
      raise ValueError(
        'RandomUniform needs minval < maxval, got '
        f'{self.minval} and {self.maxval}.'
      )

  def __call__(self, rng, shape, embedding) -> Float[Array, 'P D']:
    """Draws the whole prompt."""
    return jax.random.uniform(
      rng, tuple(shape), jnp.float32, self.minval, self.maxval
    )


@dataclasses.dataclass(frozen=True)
class SampledVocab:
  """Embeddings of ids drawn without replacement from the first `vocab_limit`.

  With replacement where the prompt is longer than that. Ids of T5's vocabulary
  are sorted by frequency, so the first 5000 are the common ones.
  """

  vocab_limit: int = 5000

  def __post_init__(self):
    if self.vocab_limit < 1:
      raise ValueError(
        f'SampledVocab.vocab_limit must be at least 1, got {self.vocab_limit}'
      )

  def __call__(self, rng, shape, embedding) -> Float[Array, 'P D']:
    """Draws P ids and takes their rows."""
    population = min(self.vocab_limit, embedding.shape[0])
    replace = shape[0] > population
    ids = jax.random.choice(rng, population, (shape[0],), replace=replace)
    return jnp.take(embedding, ids, axis=0)


def _put_rows(rows: list[Any], prompt: Any, what: str) -> Any:
  if len(rows) > prompt.shape[0]:
    logging.warning(
      '%d %s for a prompt of length %d: the last %d are left out.',
      len(rows),
      what,
      prompt.shape[0],
      len(rows) - prompt.shape[0],
    )
    rows = rows[: prompt.shape[0]]
  if not rows:
    return prompt
  return jnp.concatenate([jnp.stack(rows), prompt[len(rows) :]])


def _pieces(vocabulary: Any, text: str) -> np.ndarray:
  ids = np.asarray(vocabulary.encode(text), np.int32)
  if not ids.size:
    raise ValueError(f'The text {text!r} has no pieces in the vocabulary.')
  return ids


@dataclasses.dataclass(frozen=True)
class ClassLabels:
  """Row i is the mean of the embeddings of the pieces of label i.

  Attributes:
    labels: one string a class; those beyond the prompt's length are left out
      with a warning.
    vocabulary: a seqio vocabulary.
    fallback: fills the other rows.
  """

  labels: Sequence[str]
  vocabulary: Any
  fallback: PromptInitializer = SampledVocab()

  def __post_init__(self):
    if not self.labels:
      raise ValueError(
        'ClassLabels needs the strings of the labels, such as '
        '--labels=negative,positive.'
      )

  def __call__(self, rng, shape, embedding) -> Float[Array, 'P D']:
    """The labels' rows in front of the fallback's."""
    rows = [
      jnp.mean(embedding[_pieces(self.vocabulary, label)], axis=0)
      for label in self.labels
    ]
    return _put_rows(rows, self.fallback(rng, shape, embedding), 'labels')


@dataclasses.dataclass(frozen=True)
class FromString:
  """Row i is the embedding of piece i of a text (no EOS).

  Attributes:
    text: cut at the prompt's length, with a warning.
    vocabulary: a seqio vocabulary.
    fallback: fills the other rows.
  """

  text: str
  vocabulary: Any
  fallback: PromptInitializer = SampledVocab()

  def __call__(self, rng, shape, embedding) -> Float[Array, 'P D']:
    """The pieces' rows in front of the fallback's."""
    rows = list(embedding[_pieces(self.vocabulary, self.text)])
    return _put_rows(rows, self.fallback(rng, shape, embedding), 'pieces')


@dataclasses.dataclass(frozen=True)
class FromFile:
  """A saved prompt.

  Attributes:
    path: what `saved_prompts.read` takes: a `.npy`; the `trainable.safetensors`
      of a soft prompt, or of what `prompt-jax export` wrote of any method that
      makes prompts; or the directory of either.
    name: of one array in a safetensors file that holds more; None: it holds a
      prompt and nothing else.
    other_base: the prompt may have been trained on another base of the same
      width. A `.npy` does not say of which it is.
  """

  path: str
  name: str | None = None
  other_base: bool = False

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return () if self.other_base else (self.path,)

  def __call__(self, rng, shape, embedding) -> Any:
    """Reads the prompt, which must have exactly the shape, in float32.

    Raises:
      CheckpointError: no such file, or not a whole one.
      ValueError: another shape, several prompts, or as `saved_prompts.read`.
    """
    if self.name is None:
      prompts = saved_prompts.read(self.path).prompts
    else:
      prompts = self._named(self.name)
    if len(prompts) > 1:
      raise ValueError(
        f'{self.path} holds the prompts of {len(prompts)} tasks, but one is to '
        'start here: give the file of one.'
      )
    [prompt] = prompts
    if prompt.shape != tuple(shape):
      raise ValueError(
        f'{self.path}: the prompt has shape {prompt.shape}, expected '
        f'{tuple(shape)} (prompt length, emb_dim of the network).'
      )
    return prompt

  def _named(self, name: str) -> Float[np.ndarray, 'G P D']:
    arrays, _ = checkpoints.load_trainable(self.path)
    if name not in arrays:
      raise ValueError(
        f'{self.path}: no array {name!r}; there are {sorted(arrays)}.'
        f'{deltas.near_misses(name, arrays)}'
      )
    x = np.asarray(arrays[name], np.float32)
    return x if x.ndim == 3 else x[None]
