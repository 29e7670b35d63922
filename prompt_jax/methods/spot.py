"""SPoT (Vu et al. 2022): a prompt that was tuned on one task starts another's.

Prompts are task embeddings too: those of tasks that help each other lie near
each other. So from a bank, a folder of runs' `trainable.safetensors`, the
prompts nearest to the target's own, of a first and short run, are retrieved.
All of them have to come from one frozen base: others are not comparable.

The method that is trained is `soft_prompt.SoftPrompt`; this is its start.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import NamedTuple

from absl import logging
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_jax import deltas
from prompt_jax import paths
from prompt_jax.methods import initializers
from prompt_jax.methods import saved_prompts

Prompt = Float[np.ndarray, 'P D']


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def average_tokens(x: Prompt, y: Prompt) -> float:
  """Cosine of the mean tokens of two prompts; of a prompt and itself 1."""
  return float(_unit(x.mean(axis=0)) @ _unit(y.mean(axis=0)))


def per_token_average(x: Prompt, y: Prompt) -> float:
  """Mean over all pairs of tokens, one of each prompt, of their cosine."""
  return float(np.mean(_unit(x) @ _unit(y).T))


SIMILARITIES: Mapping[str, Callable[[Prompt, Prompt], float]] = {
  'average_tokens': average_tokens,
  'per_token_average': per_token_average,
}


def similarity(x: Prompt, y: Prompt, kind: str = 'average_tokens') -> float:
  """How near two prompts' tasks are, in [-1, 1], whatever their tokens' order.

  Args:
    x: [P, D].
    y: [P', D].
    kind: a name of `SIMILARITIES`.

  Raises:
    ValueError: no such kind.

  Source: Vu et al. 2022, arXiv 2110.07904, section 3.1, as known from the paper
  (the released code, google-research/prompt-tuning `prompt_tuning/spot`, holds
  tasks and no similarities).
  """
  if kind not in SIMILARITIES:
    raise ValueError(
      f'The similarity must be one of {", ".join(SIMILARITIES)}, got {kind!r}.'
      f'{deltas.near_misses(str(kind), SIMILARITIES)}'
    )
  x, y = (np.asarray(p, np.float64) for p in (x, y))
  return SIMILARITIES[kind](x, y)


def weights(similarities: Sequence[float]) -> np.ndarray:
  """Shares that sum to 1; what is not similar (below 0) has none.

  Raises:
    ValueError: nothing is similar.
  """
  positive = np.maximum(np.asarray(similarities, np.float64), 0.0)
  if not positive.sum() > 0:
    raise ValueError(
      'No prompt is similar to the target: the similarities are '
      f'{[round(float(s), 4) for s in similarities]}.'
    )
  return positive / positive.sum()


class Ranked(NamedTuple):
  """A prompt of a bank.

  Attributes:
    path: its file; of a file of several tasks with `#` and the task's number.
    prompt: [P, D].
    similarity: to the target's.
  """

  path: str
  prompt: Prompt
  similarity: float


def ranking(
  target: str, bank: str | Sequence[str], kind: str = 'average_tokens'
) -> list[Ranked]:
  """The prompts of a bank, the most similar to the target's first.

  Args:
    target: file of the target task's own prompt; if it lies in the bank, it is
      left out there.
    bank: a folder; every `.safetensors` in it, at any depth, is read, but of a
      run only the end, not its `best.safetensors`. Or several folders, runs,
      and files.
    kind: a name of `SIMILARITIES`.

  Raises:
    FileNotFoundError: no such folder, or no prompt in it.
    CheckpointError: the target's file is not there, or one is not whole.
    ValueError: a prompt of another base or vocabulary than the target's; a file
      that holds something else than prompts; a target of several tasks; no such
      kind.
  """
  own = saved_prompts.read(target)
  if len(own.prompts) != 1:
    raise ValueError(
      f'{target} holds the prompts of {len(own.prompts)} tasks; the target is '
      'one task.'
    )
  here = pathlib.Path(target).resolve()
  same = (here, here / saved_prompts.FILE)
  files = [path for path in _files(bank) if path.resolve() not in same]
  if not files:
    raise FileNotFoundError(
      f'{bank}: no .safetensors but the target; put the '
      f'{saved_prompts.FILE} of source runs there.'
    )
  found = []
  for file in files:
    saved = saved_prompts.read(str(file))
    _check_origin(saved, own)
    for i, prompt in enumerate(saved.prompts):
      path = f'{file}#{i}' if len(saved.prompts) > 1 else str(file)
      near = similarity(prompt, own.prompts[0], kind)
      found.append(Ranked(path, prompt, near))
  return sorted(found, key=lambda one: -one.similarity)


def _files(bank: str | Sequence[str]) -> list[pathlib.Path]:
  """Of a bank, each once."""
  found: dict[pathlib.Path, None] = {}
  for name in [bank] if isinstance(bank, str) else bank:
    folder = pathlib.Path(name)
    if folder.is_file():
      found[folder] = None
    elif folder.is_dir():
      found |= dict.fromkeys(
        path
        for path in sorted(folder.rglob('*.safetensors'))
        if path.name != 'best.safetensors'
        or not (path.parent / saved_prompts.FILE).is_file()
      )
    else:
      raise FileNotFoundError(
        f'No folder of prompts {name!r}.{paths.near(name)}'
      )
  return list(found)


def _check_origin(
  saved: saved_prompts.SavedPrompts, own: saved_prompts.SavedPrompts
) -> None:
  """Refuses what was trained on another base, by its fingerprint or width."""
  widths = saved.prompts.shape[-1], own.prompts.shape[-1]
  if widths[0] != widths[1]:
    raise ValueError(
      f"{saved.path}: a prompt of width {widths[0]}, but the target's is "
      f'{widths[1]} wide: they come from different base models.'
    )
  saved_prompts.check_same_base(saved, own)


def table(ranked: Sequence[Ranked]) -> str:
  """A ranking as lines of text, the similarity and the file."""
  return '\n'.join(f'{one.similarity:7.4f}  {one.path}' for one in ranked)


@dataclasses.dataclass(frozen=True)
class FromBank:
  """Starts at what a bank holds nearest to the target, an initializer.

  With `top_k` 1 at the most similar prompt; else at the mean of the `top_k`
  most similar, weighted by their similarities (`weights`).

  Attributes:
    bank: as `ranking` takes it; None for no transfer, which is how the prompts
      of a bank and the target's own are made.
    target: file of the target task's own prompt.
    top_k: how many prompts are retrieved.
    kind: a name of `SIMILARITIES`.
    fallback: what is drawn without a bank.

  Raises:
    ValueError: a bank without a target or the reverse; top_k below 1.
  """

  bank: str | Sequence[str] | None = None
  target: str | None = None
  top_k: int = 1
  kind: str = 'average_tokens'
  fallback: initializers.PromptInitializer = dataclasses.field(
    default_factory=initializers.SampledVocab
  )

  def __post_init__(self):
    if (self.bank is None) != (self.target is None):
      raise ValueError(
        'FromBank needs both a bank and the file of the target, got '
        f'{self.bank!r} and {self.target!r}.'
      )
    if not isinstance(self.top_k, int) or self.top_k < 1:
      raise ValueError(
        'FromBank.top_k must be a whole number of at least 1, got '
        f'{self.top_k!r}.'
      )

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return (
      ()
      if self.bank is None
      else (str(self.target), *map(str, _files(self.bank)))
    )

  def __call__(self, rng, shape, embedding) -> Float[Array, 'P D']:
    """Reads the bank; every prompt taken must have the prompt's shape.

    Raises:
      ValueError: another shape, or as `ranking`.
    """
    if self.bank is None or self.target is None:
      logging.warning('SPoT without a bank: nothing is transferred.')
      return self.fallback(rng, shape, embedding)
    taken = ranking(self.target, self.bank, self.kind)[: self.top_k]
    for one in taken:
      if one.prompt.shape != tuple(shape):
        raise ValueError(
          f'{one.path}: the prompt has shape {one.prompt.shape}, expected '
          f'{tuple(shape)} (prompt length, emb_dim of the network).'
        )
    logging.info('SPoT starts at\n%s', table(taken))
    if len(taken) == 1:
      return jnp.asarray(taken[0].prompt)
    shares = weights([one.similarity for one in taken])
    prompts = np.stack([one.prompt for one in taken])
    mean = np.tensordot(shares, prompts, axes=1)
    return jnp.asarray(mean, jnp.float32)
