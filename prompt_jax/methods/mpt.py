"""MPT, multitask prompt tuning (Wang et al. 2023): a prompt shared by tasks.

Two stages, one method. In the source stage S tasks share the prompt, and each
is taught by a prompt of its own that was tuned before (`distillation_loss`). In
the target stage training goes on from the shared prompt and the mean of the
tasks' factors (`from_source`).
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods import saved_prompts
from prompt_jax.network import layers


class MPT(nn.Module):
  """Prompts that are one prompt, scaled by each task's low-rank factors.

      Emb(V + g P + j) = prompt[j] * (u[g] v[g])[j]

  with prompt [P, D], u [G, P, R] and v [G, R, D]. The factors start as ones (of
  several ranks, the first: the others start at zero), so that every task starts
  at the shared prompt. Only `u v` counts: c u and v / c are the same method.

  Attributes:
    length: P, soft tokens of one task.
    num_tasks: G, tasks with factors of their own; an example's is `task_ids`.
    rank: R of the factors.
    prompt_init: initial value of the shared prompt.
    source: a `trainable.safetensors` of a source stage to start from, in place
      of `prompt_init` and ones; see `from_source`.
    teachers: files (`saved_prompts`) that hold the tasks' own prompts, one or
      several each, in the order of `task_ids`. Without them there is no
      distillation.
    distillation: lambda, the weight of `distillation_loss`; 0.9 is the paper's
      as known (not confirmed).
    temperature: tau of the logits in it.

  Raises:
    ValueError: a length, rank or number of tasks below 1; a rank above P or D;
      a weight below 0; a temperature that is not above 0. When called: teachers
      of another number, shape, base or vocabulary; teachers in a chain.

  Source: Wang et al. 2023, arXiv 2303.02861, section 3, as known from the
  paper; checked against huggingface/peft
  `src/peft/tuners/multitask_prompt_tuning/model.py`, which has the same factors
  but starts them near 0, and no distillation.
  """

  length: int = 100
  num_tasks: int = 1
  rank: int = 1
  prompt_init: initializers.PromptInitializer = initializers.SampledVocab()
  source: str | None = None
  teachers: Sequence[str] = ()
  distillation: float = 0.9
  temperature: float = 1.0

  def __post_init__(self):
    for field in ('length', 'num_tasks', 'rank'):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f'MPT.{field} must be a whole number of at least 1, got {value!r}.'
        )
    if isinstance(self.teachers, str):
      raise ValueError(
        f'MPT.teachers must be a list of files, got {self.teachers!r}.'
      )
    for field, least in (('distillation', 'of at least 0'),
                         ('temperature', 'above 0')):  # fmt: skip
      value = getattr(self, field)
      number = isinstance(value, int | float) and math.isfinite(value)
      if not number or value < 0 or (value == 0 and least == 'above 0'):
        raise ValueError(
          f'MPT.{field} must be a number {least}, got {value!r}.'
        )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, self.length

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return (*self.teachers, *([self.source] if self.source else []))

  @property
  def auxiliary_loss(self) -> Callable[..., Any] | None:
    """What the model's loss has on top, `distillation_loss`, with teachers."""
    return functools.partial(distillation_loss, self) if self.teachers else None

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the folded prompts on the token embedding, exported or not."""
    width, rank = context.config.emb_dim, self.rank
    if rank > min(self.length, width):
      raise ValueError(
        f'MPT.rank is {rank}, but the factors of a prompt [{self.length}, '
        f'{width}] have a rank of at most {min(self.length, width)}.'
      )
    shapes = {
      'prompt': (self.length, width),
      'u': (self.length, rank),
      'v': (rank, width),
    }
    if self.teachers:
      if self.path:
        raise ValueError(
          'MPT with teachers cannot stand in a Chain: their rows would have '
          'to stand among those of the other methods. Train it alone.'
        )
      self.variable('constants', 'teachers', self._read_teachers, width)
    inits = self._inits(context, shapes)
    several = self.num_tasks > 1

    def param(name: str, *axes: str) -> Array:
      shape = shapes[name]
      if several and name != 'prompt':
        shape, axes = (self.num_tasks, *shape), ('task', *axes)
      return layers.param(self, name, inits[name], shape, axes)

    prompt = param('prompt', 'prompt', 'prompt_embed')
    u, v = param('u', 'prompt', 'rank'), param('v', 'rank', 'prompt_embed')
    prompts = prompt * jnp.matmul(u, v, precision='highest')
    rows = prompts.reshape(1, -1, width)
    return {f'{context.embedder}/rows': deltas.Routed(rows)}

  def _inits(
    self, context: base.Context, shapes: Mapping[str, Sequence[int]]
  ) -> dict[str, Callable[..., Any]]:
    """Of each parameter, from its rng, shape and type to its start."""
    if self.source is not None and self.is_initializing():
      start = from_source(self.source, shapes)
      return {
        name: lambda rng, shape, dtype, x=x: jnp.broadcast_to(x, shape)
        for name, x in start.items()
      }

    def prompt(rng: Any, shape: Sequence[int], dtype: Any) -> Any:
      drawn = self.prompt_init(rng, shape, context.embedding)
      return jnp.asarray(drawn, dtype)

    return {
      'prompt': prompt,
      'u': functools.partial(_ones, axis=-1, others=1.0),
      'v': functools.partial(_ones, axis=-2, others=0.0),
    }

  def _read_teachers(self, width: int) -> Float[Array, 'G P D']:
    """The frozen prompts of all tasks."""
    found = [saved_prompts.read(path) for path in self.teachers]
    saved_prompts.check_alike(found)
    prompts = np.concatenate([one.prompts for one in found])
    shape = (self.num_tasks, self.length, width)
    if prompts.shape != shape:
      raise ValueError(
        f'MPT.teachers hold prompts of shape {prompts.shape}, expected {shape} '
        '(num_tasks, length, emb_dim of the network).'
      )
    return jnp.asarray(prompts)


def _ones(
  rng: Any, shape: Sequence[int], dtype: Any, axis: int, others: float
) -> Array:
  """Ones at rank 0; at the others normal numbers, so that they part, or 0."""
  drawn = others * jax.random.normal(rng, shape, dtype)
  rank = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis)
  return jnp.where(rank == 0, jnp.ones((), dtype), drawn)


def from_source(
  path: str, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
  """What a target stage starts from, of a source stage's file.

  The shared prompt as it is, u and v each averaged over the source tasks. (The
  product of the means is not the mean of the products; it is what PEFT does.)

  Args:
    path: `trainable.safetensors` of the source stage.
    shapes: of 'prompt' [P, D], 'u' [P, R] and 'v' [R, D] here.

  Raises:
    CheckpointError: no such file, or not a whole one.
    ValueError: it holds no MPT, or one of another length, rank or width.
  """
  flat, _ = checkpoints.load_trainable(path)
  found = {}
  for name, shape in shapes.items():
    if f'method/{name}' not in flat:
      raise ValueError(
        f'{path}: no array {f"method/{name}"!r}, so it is no MPT; there are '
        f'{sorted(flat)}.'
      )
    x = flat[f'method/{name}']
    if x.ndim == 3:
      x = x.mean(axis=0)
    if x.shape != tuple(shape):
      raise ValueError(
        f'{path}: {name} has shape {x.shape} for one task, expected '
        f'{tuple(shape)}. Length, rank and base must be those of the source '
        'stage.'
      )
    found[name] = x
  return found


# ---- the source stage's loss -----------------------------------------------


def distillation_loss(
  method: MPT,
  model: Any,
  frozen: Any,
  params: Any,
  found: deltas.Deltas,
  batch: Mapping[str, Any],
  outputs: tuple[Any, Any],
) -> Float[Array, '']:
  """How far the students are from their teachers: lambda (logits + hidden).

      logits = mean over target tokens of
                 tau^2 KL(softmax(teacher / tau) || softmax(student / tau))
      hidden = sum over the stacks of the mean over positions that are no
                 padding, and over D, of (teacher - student)^2

  The teachers' pass is that of the same batch with their rows laid in place of
  the students': row j of task g has the same id in both. It is without dropout,
  and no gradient flows into it. The outputs of a stack's last layer are taken
  before its final norm; of the decoder, at the target tokens.

  Args:
    method: with teachers.
    model: whose `apply` gives logits and the outputs of layers.
    frozen: holds the teachers, 'constants/teachers' [G, P, D].
    params: of the network.
    found: deltas of the students.
    batch: T5X's features.
    outputs: of the students: of `model.apply`, `mutable=['intermediates']`.

  Returns:
    A mean over the batch: it is to be added to a loss that is a mean over
    target tokens.

  Source: Wang et al. 2023, arXiv 2303.02861, section 3.2, as known from the
  paper; lambda, tau and which layers and positions count are not confirmed.
  """
  [path] = [path for path in found if path.endswith('/rows')]
  teachers = frozen['constants']['teachers']
  rows = teachers.reshape(1, -1, teachers.shape[-1])
  taught = model.apply(
    params,
    {**found, path: deltas.Routed(rows)},
    batch,
    mutable=['intermediates'],
  )
  logits, seen = outputs
  teacher_logits, teacher_seen = jax.lax.stop_gradient(taught)
  weights = batch.get('decoder_loss_weights')
  targets = batch['decoder_target_tokens'] if weights is None else weights
  places = {'decoder': targets > 0}
  if 'encoder_input_tokens' in batch:
    places['encoder'] = batch['encoder_input_tokens'] > 0
  divergence = _divergence(teacher_logits, logits, method.temperature)
  loss = _mean(divergence, places['decoder'])
  for stack, real in places.items():
    x, y = (last_hidden(s, stack) for s in (seen, teacher_seen))
    distance = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))
    loss += _mean(jnp.mean(distance, axis=-1), real)
  return method.distillation * loss


def _divergence(
  teacher: Float[Array, 'B U V'], student: Float[Array, 'B U V'], tau: float
) -> Float[Array, 'B U']:
  """`tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`."""
  p, q = (
    jax.nn.log_softmax(x.astype(jnp.float32) / tau) for x in (teacher, student)
  )
  return tau**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _mean(x: Float[Array, 'B T'], real: Array) -> Float[Array, '']:
  """Mean where `real`; 0 where nothing is."""
  return jnp.sum(jnp.where(real, x, 0.0)) / jnp.maximum(jnp.sum(real), 1)


def last_hidden(seen: Any, stack: str) -> Float[Array, 'B T D']:
  """The output of a stack's last layer, from `intermediates`."""
  found = seen['intermediates'][stack]
  if 'layers' in found:
    return found['layers']['hidden'][-1]
  last = max(found, key=lambda name: int(name.removeprefix('layers_')))
  return found[last]['hidden']
