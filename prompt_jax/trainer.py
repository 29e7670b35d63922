"""One step of training, and nothing of files, flags or data.

`train_step` is a pure function of (state, frozen, batch): jit it with the state
donated, or `jax.vmap` it over states, batches and hyperparameters (axis `run`)
to train many prompts on one set of frozen weights.  `train_steps` makes many
steps in one program.  The loop is in `loop.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from prompt_jax import losses
from prompt_jax import partitioning
from prompt_jax.models import EncoderDecoderModel
from prompt_jax.train_state import TrainState

Batch = Mapping[str, Any]


def train_step(
  state: TrainState,
  frozen: Any,
  batch: Batch,
  learning_rate_scale: Any = 1.0,
  *,
  model: EncoderDecoderModel,
  optimizer: optax.GradientTransformationExtraArgs,
  learning_rate_fn: Callable[[Any], Any],
  num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, Any]]:
  """One update of the trainable parameters.

  A loss, gradient or update that is not finite leaves the state as it was and
  says so in `metrics['finite']`; the loop then stops.

  Args:
    state: donated.
    frozen: argument, sharded, never donated, differentiated or saved.
    batch: T5X's features, [B, ...].
    learning_rate_scale: of this run, where several train at once.
    model: network, method and loss.
    optimizer: `update` takes the learning rate as an extra argument.
    learning_rate_fn: from the step to the learning rate.
    num_microbatches: parts of the batch whose gradients are added up.

  Returns:
    The new state and sums of metrics over the batch.
  """
  rng = jax.random.fold_in(state.rng, state.step)
  factor, weights = losses.get_loss_normalizing_factor_and_weights(
    model.loss_normalizing_factor, batch
  )
  if weights is not None:
    batch = {**batch, 'decoder_loss_weights': weights}

  def loss_fn(trainable, part, rng):
    return model.loss_fn(frozen, trainable, part, rng, factor, num_microbatches)

  grads, sums = _accumulate(
    loss_fn, state.trainable, batch, rng, num_microbatches
  )
  learning_rate = learning_rate_fn(state.step) * learning_rate_scale
  updates, opt_state = optimizer.update(
    grads,
    state.opt_state,
    state.trainable,
    learning_rate=learning_rate,
    learning_rate_scale=learning_rate_scale,
    step=state.step,
  )
  new = TrainState(
    step=state.step + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    opt_state=opt_state,
    rng=state.rng,
  )
  grad_norm = optax.global_norm(grads)
  finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
  finite &= jnp.isfinite(optax.global_norm(updates))
  new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
  extra = {
    'grad_norm': grad_norm,
    'learning_rate': learning_rate,
    'finite': finite,
  }
  return new, sums | extra


def train_steps(
  state: Any,
  frozen: Any,
  data: Batch,
  rows: Any,
  count: Any,
  *,
  step_fn: Callable[..., tuple[Any, dict[str, Any]]],
) -> tuple[Any, dict[str, Any]]:
  """`count` steps in one program, on a data set that lies on the devices.

  Stops after a step of which no run is finite.

  Args:
    state: donated.
    frozen: as of `train_step`.
    data: all examples, [n, ...] each.
    rows: the examples of each step's batch, int32 [N, B], or [N, K, B] where
      `step_fn` trains K runs.
    count: steps to make, at most N; an array, so that the program is the same
      for all.
    step_fn: `train_step` with its model and optimizer, or a `jax.vmap` of it.

  Returns:
    The last state, and the metrics of each step in the first `count` of N.
  """

  def one(i: Any, state: Any) -> tuple[Any, dict[str, Any]]:
    index = rows[i]
    names = (*(None,) * (index.ndim - 1), 'batch')
    batch = {
      name: nn.with_logical_constraint(
        x[index], (*names, *(None,) * (x.ndim - 1))
      )
      for name, x in data.items()
    }
    return step_fn(state, frozen, batch)

  def body(carry: Any) -> Any:
    i, state, metrics, _ = carry
    state, found = one(i, state)
    metrics = jax.tree.map(lambda xs, x: xs.at[i].set(x), metrics, found)
    return i + 1, state, metrics, jnp.any(found['finite'])

  _, shapes = jax.eval_shape(one, 0, state)
  metrics = jax.tree.map(
    lambda s: jnp.zeros((len(rows), *s.shape), s.dtype), shapes
  )
  _, state, metrics, _ = jax.lax.while_loop(
    lambda carry: (carry[0] < count) & carry[3],
    body,
    (jnp.zeros((), jnp.int32), state, metrics, jnp.array(True)),
  )
  return state, metrics


def _accumulate(
  loss_fn: Any, trainable: Any, batch: Batch, rng: Any, parts: int
) -> tuple[Any, dict[str, Any]]:
  """Gradients and sums of the batch, one part at a time."""
  grad_fn = jax.grad(loss_fn, has_aux=True)
  if parts == 1:
    return grad_fn(trainable, batch, rng)

  def cut(x: Any) -> Any:
    if x.shape[0] % parts:
      raise ValueError(
        f'A batch of {x.shape[0]} rows cannot be cut into {parts} equal '
        'microbatches.'
      )
    # Row i goes to part i % parts, so that each part lies on all devices.
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

  def add(total: Any, part: Any) -> tuple[Any, None]:
    rows, i = part
    found = grad_fn(trainable, rows, jax.random.fold_in(rng, i))
    return jax.tree.map(jnp.add, total, found), None

  cuts = jax.tree.map(cut, dict(batch))
  first = jax.tree.map(lambda x: x[0], cuts)
  shapes = jax.eval_shape(grad_fn, trainable, first, rng)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(add, zeros, (cuts, jnp.arange(parts)))[0]


def init_state(
  rng: Any,
  params: Any,
  *,
  model: EncoderDecoderModel,
  optimizer: optax.GradientTransformationExtraArgs,
) -> TrainState:
  """The state before the first step.

  Args:
    rng: key data, uint32 [2].
    params: all parameters of the network, float32, without axis names.
    model: whose method is initialised and whose patterns choose.
    optimizer: whose state is initialised.
  """
  network, _ = model.split(params)
  init_rng, run_rng = jax.random.split(rng)
  method = model.init_method(init_rng, params)
  trainable = {'method': partitioning.unbox(method), 'network': network}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    opt_state=optimizer.init(trainable),
    rng=run_rng,
  )


def eval_step(
  trainable: Any, frozen: Any, batch: Batch, *, model: EncoderDecoderModel
) -> dict[str, Any]:
  """Sums of metrics over a batch, without dropout; loss is a sum."""
  return model.loss_fn(frozen, trainable, batch)[1]
