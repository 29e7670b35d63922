"""IPT, intrinsic prompt tuning (Qin et al. 2021): prompts of few numbers.

Two stages, two methods. `Subspace` learns from the prompts of many tasks to
encode a prompt as q numbers and to decode it again. `SubspacePrompt` keeps the
decoder and tunes nothing but the q numbers of a new task.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods import projections
from prompt_jax.methods import saved_prompts
from prompt_jax.network import layers

# Parameters by path, for `encode` and `decode`.
Params = Mapping[str, Any]
_AXES = {
  'encoder': ('prompt_embed', 'subspace'),
  'decoder/hidden': ('subspace', 'adapter_mid'),
  'decoder/out': ('adapter_mid', 'prompt_embed'),
}


def _affine(x: Any, params: Params, path: str) -> Any:
  kernel, bias = (
    jnp.asarray(params[f'{path}/{name}'], jnp.float32)
    for name in ('kernel', 'bias')
  )
  return jnp.matmul(x, kernel, precision='highest') + bias


def encode(
  params: Params, prompts: Float[Array, 'G P D']
) -> Float[Array, 'G q']:
  """`vec(P) A + a`."""
  return _affine(prompts.reshape(len(prompts), -1), params, 'encoder')


def decode(
  params: Params, codes: Float[Array, 'G q'], length: int
) -> Float[Array, 'G P D']:
  """`tanh(z B + b) C + c`, as P rows."""
  hidden = jnp.tanh(_affine(codes, params, 'decoder/hidden'))
  rows = _affine(hidden, params, 'decoder/out')
  return rows.reshape(len(codes), length, -1)


def _specs(
  path: str, inputs: int, outputs: int
) -> dict[str, tuple[Any, tuple[int, ...], tuple[str, ...]]]:
  """Kernel and bias, uniform in +-1 / sqrt(inputs), for `base.params_at`."""
  bound = inputs**-0.5

  def init(rng: Any, shape: Any, dtype: Any) -> Any:
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  axes = _AXES[path]
  return {
    f'{path}/kernel': (init, (inputs, outputs), axes),
    f'{path}/bias': (init, (outputs,), axes[1:]),
  }


def _decoder_specs(dimension: int, hidden: int, size: int) -> dict[str, Any]:
  specs = _specs('decoder/hidden', dimension, hidden)
  return specs | _specs('decoder/out', hidden, size)


# ---- stage 1: the subspace ---------------------------------------------------


class Subspace(nn.Module):
  """An autoencoder over the prompts of S training tasks (MSF in the paper).

      z_t = vec(P_t) A + a;   Q_t = tanh(z_t B + b) C + c
      Emb(V + t P + j) = Q_t[j]
      loss = loss of the tasks + alpha mean((Q_t - P_t)^2)

  with A [P D, q], B [q, h] and C [h, P D]. An example of task t, `task_ids`,
  sees the decoded prompt Q_t. The mean is over all tasks and all numbers of
  their prompts (the released code: over the tasks of the batch, which is the
  same on average where they are mixed equally).

  Attributes:
    sources: the trained prompts, in the order of `task_ids`: files of one
      prompt or of several (`saved_prompts.read`), or initializers, which are
      for trying out.
    length: P, soft tokens of one task.
    dimension: q of the subspace.
    hidden_dim: h of the decoder.
    alpha: of the reconstruction in the loss. The paper's 200 belongs to a loss
      that is summed over target tokens, and to prompts of the size of its base,
      BART; those of T5 1.1 are an order of magnitude larger.

  Raises:
    ValueError: no source; a size below 1; an alpha below 0; when parameters are
      made, prompts of another shape, base or vocabulary than the others'.

  Source: Qin et al. 2021, arXiv 2110.07867, section 3, as known from
  the paper; checked against
  thunlp/Intrinsic-Prompt-Tuning `bartPrompt.py` (MyBartPrompt_AE, AE_type 1)
  and `run_multitask_AE.py`.
  """

  sources: Sequence[str | initializers.PromptInitializer]
  length: int = 100
  dimension: int = 5
  hidden_dim: int = 768
  alpha: float = 200.0

  def __post_init__(self):
    projections.check_whole_numbers(self, 'length', 'dimension', 'hidden_dim')
    if isinstance(self.sources, str) or not self.sources:
      raise ValueError(
        'Subspace.sources must be a list of the prompts of the training tasks, '
        f'got {self.sources!r}.'
      )
    a = self.alpha
    if not (isinstance(a, int | float) and math.isfinite(a) and a >= 0):
      raise ValueError(
        f'Subspace.alpha must be a number of at least 0, got {a!r}.'
      )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    sizes = [
      len(saved_prompts.read(s).prompts) if isinstance(s, str) else 1
      for s in self.sources
    ]
    return sum(sizes), self.length

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return tuple(s for s in self.sources if isinstance(s, str))

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the decoded prompts of all tasks on the token embedding."""
    width = context.config.emb_dim
    size = self.length * width
    read = functools.partial(_read, self.sources, self.length, context)
    prompts = self.variable('constants', 'prompts', read).value
    prompts = jnp.asarray(prompts, jnp.float32)
    params = base.params_at(
      self,
      _specs('encoder', size, self.dimension)
      | _decoder_specs(self.dimension, self.hidden_dim, size),
    )
    decoded = decode(params, encode(params, prompts), self.length)
    error = jnp.mean(jnp.square(decoded - prompts))
    self.sow('losses', 'reconstruction', self.alpha * error)
    rows = decoded.reshape(1, -1, width)
    return {f'{context.embedder}/rows': deltas.Routed(rows)}


def _read(
  sources: Sequence[str | initializers.PromptInitializer],
  length: int,
  context: base.Context,
) -> Float[Array, 'S P D']:
  """The prompts of the training tasks."""
  shape = (length, context.config.emb_dim)
  files = [saved_prompts.read(s) for s in sources if isinstance(s, str)]
  if files:
    saved_prompts.check_alike(files)
    _check_shape(files[0], shape)
  else:
    logging.warning('IPT: none of the sources is the file of a prompt.')
  found = []
  for i, source in enumerate(sources):
    if isinstance(source, str):
      found.append(jnp.asarray(saved_prompts.read(source).prompts))
    else:
      one = source(jax.random.PRNGKey(i), shape, context.embedding)
      found.append(jnp.asarray(one, jnp.float32)[None])
  return jnp.concatenate(found)


def _check_shape(saved: saved_prompts.SavedPrompts, shape: Any) -> None:
  if saved.prompts.shape[1:] != shape:
    raise ValueError(
      f'{saved.path}: a prompt has shape {saved.prompts.shape[1:]}, expected '
      f'{shape} (prompt length, emb_dim of the network).'
    )


# ---- stage 2: a prompt in it -------------------------------------------------


class SubspacePrompt(nn.Module):
  """A prompt of which only q numbers are learned (IST in the paper).

      Emb(V + g P + j) = (tanh(z_g B + b) C + c)[j]

  with the decoder B, b, C, c of a `Subspace` that was trained before, frozen.
  Without one the decoder is random, as a new `Subspace` has it: the paper's
  baseline.

  A slice of k < q dimensions is spanned by the principal directions of the
  training tasks' codes, from their mean m: z = m + y U with U [k, q], and y is
  learned. (The paper trains a subspace for each dimension.)

  Attributes:
    subspace: `trainable.safetensors` of a `Subspace`; None is random.
    length: P, soft tokens of one task; that of the subspace.
    dimension: q where the decoder is random; else k of a slice, None for all q.
    num_tasks: G, tasks with a z of their own.
    sources: the prompts that the subspace was trained with; of a slice only.
    start: the prompt of a task to start at, as `saved_prompts.read` takes it:
      z is its code. None draws z from N(0, 0.02^2), for each task.
    hidden_dim: h of a random decoder.
    seed: of a random decoder.

  Raises:
    ValueError: a size below 1; no dimension for a random decoder; a slice
      without `sources`, or of more dimensions than their codes span; a file
      that is no subspace, or one of prompts of another shape.

  Source: as `Subspace`.
  """

  subspace: str | None = None
  length: int = 100
  dimension: int | None = None
  num_tasks: int = 1
  sources: Sequence[str] = ()
  start: str | None = None
  hidden_dim: int = 768
  seed: int = 0

  def __post_init__(self):
    projections.check_whole_numbers(self, 'length', 'num_tasks', 'hidden_dim')
    if self.dimension is not None or self.subspace is None:
      projections.check_whole_numbers(self, 'dimension')
    if self.subspace is None and self.start is not None:
      raise ValueError(
        'SubspacePrompt.start is encoded by a trained subspace, but `subspace` '
        'is None: give the trainable.safetensors of one.'
      )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, self.length

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return tuple(x for x in (self.subspace, self.start, *self.sources) if x)

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the decoded prompts on the token embedding."""
    shape = (self.length, context.config.emb_dim)
    decoder = self.variable('constants', 'decoder', self._decoder, shape).value
    size: tuple[int, ...] = (decoder['decoder/hidden/kernel'].shape[0],)
    axes: tuple[str, ...] = ('subspace',)
    if self.num_tasks > 1:
      size, axes = (self.num_tasks, *size), ('task', *axes)
    z = layers.param(self, 'z', self._init, size, axes)
    codes = z.reshape(self.num_tasks, -1)
    rows = decode(decoder, codes, self.length)
    rows = rows.reshape(1, -1, shape[-1])
    return {f'{context.embedder}/rows': deltas.Routed(rows)}

  def _decoder(self, shape: tuple[int, int]) -> dict[str, Any]:
    """Its kernels and biases; those of a slice fold U and m into the first."""
    if self.subspace is None:
      assert self.dimension is not None
      specs = _decoder_specs(self.dimension, self.hidden_dim, math.prod(shape))
      rngs = jax.random.split(jax.random.PRNGKey(self.seed), len(specs))
      return {
        path: draw(rng, size, jnp.float32)
        for rng, (path, (draw, size, _)) in zip(
          rngs, specs.items(), strict=True
        )
      }
    params = load(self.subspace, shape)
    found = {k: v for k, v in params.items() if k.startswith('decoder')}
    mean, directions = self._slice(params)
    kernel = found['decoder/hidden/kernel']
    found['decoder/hidden/bias'] = found['decoder/hidden/bias'] + mean @ kernel
    found['decoder/hidden/kernel'] = directions @ kernel
    return {path: jnp.asarray(x, jnp.float32) for path, x in found.items()}

  def _slice(self, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """The mean m [q] and U [k, q]; of all dimensions 0 and the identity."""
    q = params['encoder/bias'].shape[0]
    if self.dimension in (None, q):
      return np.zeros(q, np.float32), np.eye(q, dtype=np.float32)
    if isinstance(self.sources, str) or not self.sources:
      raise ValueError(
        f'{self.subspace} has {q} dimensions; for a slice of {self.dimension} '
        'give SubspacePrompt.sources, the prompts that it was trained with.'
      )
    files = [saved_prompts.read(path) for path in self.sources]
    saved_prompts.check_alike(files)
    prompts = np.concatenate([f.prompts for f in files])
    return principal(_codes(params, prompts), self.dimension)

  def _init(self, rng: Any, shape: Any, dtype: Any) -> Any:
    """The code of `start`, or small numbers."""
    if self.start is None or self.subspace is None:
      return 0.02 * jax.random.normal(rng, shape, dtype)
    saved = saved_prompts.read(self.start)
    params = load(self.subspace, saved.prompts.shape[1:])
    mean, directions = self._slice(params)
    codes = _codes(params, saved.prompts)
    if len(codes) not in (1, self.num_tasks):
      raise ValueError(
        f'{self.start} holds the prompts of {len(codes)} tasks, but '
        f'SubspacePrompt.num_tasks is {self.num_tasks}.'
      )
    codes = (codes - mean) @ directions.T
    codes = np.broadcast_to(codes, (self.num_tasks, codes.shape[-1]))
    return jnp.asarray(codes.reshape(shape), dtype)


def _codes(
  params: Params, prompts: Float[np.ndarray, 'G P D']
) -> Float[np.ndarray, 'G q']:
  """`encode` of what was read from files, also where a program is traced."""
  with jax.ensure_compile_time_eval():
    return np.asarray(encode(params, jnp.asarray(prompts)))


def principal(
  codes: Float[np.ndarray, 'S q'], dimension: int
) -> tuple[Float[np.ndarray, ' q'], Float[np.ndarray, 'k q']]:
  """The mean of codes, and the k orthonormal directions in which they differ.

  Those of the largest variance come first; the largest number of each is
  positive, so that they are the same wherever they are computed.

  Raises:
    ValueError: k is more than the directions in which the codes differ.
  """
  mean = codes.mean(axis=0)
  _, scale, found = np.linalg.svd(codes - mean, full_matrices=False)
  rank = int(np.sum(scale > 1e-5 * max(float(scale[0]), 1e-30)))
  if dimension > rank:
    raise ValueError(
      f'A slice of {dimension} dimensions was asked for, but the codes of the '
      f'{len(codes)} training tasks differ in {rank} of {codes.shape[1]}.'
    )
  found = found[:dimension]
  largest = np.take_along_axis(
    found, np.abs(found).argmax(axis=1, keepdims=True), axis=1
  )
  return mean.astype(np.float32), (found * np.sign(largest)).astype(np.float32)


def load(path: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
  """Parameters of a trained `Subspace` by path, for `encode` and `decode`.

  Args:
    path: its `trainable.safetensors`.
    shape: (P, D) of the prompts here.

  Raises:
    CheckpointError: no such file, or not a whole one.
    ValueError: it holds no subspace, or one of other prompts.
  """
  flat, _ = checkpoints.load_trainable(path)
  found = {
    name.removeprefix('method/'): x
    for name, x in flat.items()
    if name.startswith('method/')
  }
  wanted = {f'{p}/{name}' for p in _AXES for name in ('kernel', 'bias')}
  if found.keys() != wanted:
    raise ValueError(
      f'{path}: no subspace, which has {sorted(wanted)}; there are '
      f'{sorted(flat)}.'
    )
  size = found['decoder/out/bias'].shape[0]
  if size != math.prod(shape):
    raise ValueError(
      f'{path}: a subspace of prompts of {size} numbers, expected {shape} '
      '(prompt length, emb_dim of the network).'
    )
  return found
