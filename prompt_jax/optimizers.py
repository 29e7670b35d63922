"""Optimizers with T5X's semantics.

For: the update of the trainable tree. Every optimizer here is an
`optax.GradientTransformationExtraArgs` that is told its learning rate at each
step, `update(grads, state, params, learning_rate=lr)`, so that the trainer can
compute the rate from a schedule, report it, and scale it per run under
`jax.vmap`. Not for: the schedules (`prompt_jax.schedules`), or choosing what is
trained. A tree holds what is trained and nothing else, so there are no masks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree
import optax

from prompt_jax.schedules import require


class AdafactorState(NamedTuple):
  """State of `adafactor`: four trees in the containers of the parameters.

  Where a parameter has no such accumulator a tree holds None, no leaf.

  Attributes:
    count: updates done, plus `initial_step`. int32 scalar.
    v_row: second moments averaged over the larger axis, of factored matrices.
    v_col: second moments averaged over the smaller axis, of factored matrices.
    v: second moments of everything else, in the parameter's shape.
    m: first moments of the updates, if there is a `beta1`.
  """

  count: Int[Array, '']
  v_row: PyTree
  v_col: PyTree
  v: PyTree
  m: PyTree


def start_at(opt_state: Any, step: int) -> Any:
  """The state, every Adafactor in it at that step, as its updates depend on."""

  def is_one(x: Any) -> bool:
    return isinstance(x, AdafactorState)

  def one(x: Any) -> Any:
    return x._replace(count=x.count * 0 + step) if is_one(x) else x

  return jax.tree.map(one, opt_state, is_leaf=is_one)


class _Moments(NamedTuple):
  """The accumulators of one parameter; see `AdafactorState`."""

  v_row: Any = None
  v_col: Any = None
  v: Any = None
  m: Any = None


def _has_layers_axis(path: tuple[Any, ...]) -> bool:
  """Whether a leaf is a stack of scanned layers, T5X's `layers` -> BATCH."""
  return any(getattr(part, 'key', None) == 'layers' for part in path)


def _rms(x: Float[Array, '...']) -> Float[Array, '']:
  return jnp.sqrt(jnp.mean(x * x))


@dataclasses.dataclass(frozen=True)
class _Adafactor:
  """The hyperparameters of `adafactor`, checked, and what they determine."""

  decay_rate: float
  step_offset: int
  initial_step: int
  multiply_by_parameter_scale: bool
  clipping_threshold: float | None
  weight_decay_rate: float | None
  weight_decay_rate_lr_exponent: float | None
  beta1: float | None
  epsilon1: float
  epsilon2: float
  factored: bool
  min_dim_size_to_factor: int
  global_norm_clip_threshold: float | None

  def __post_init__(self):
    def check(name, expected, ok):
      value = getattr(self, name)
      require(value is not None and ok(value), name, expected, value)

    def check_if_given(name, expected, ok):
      if getattr(self, name) is not None:
        check(name, f'None or {expected}', ok)

    check('decay_rate', 'in (0, 1]', lambda x: 0 < x <= 1)
    check('step_offset', 'at least 0', lambda x: x >= 0)
    # A step before the offset would raise a negative number to a power.
    offset = self.step_offset
    check(
      'initial_step', f'at least step_offset ({offset})', lambda x: x >= offset
    )
    check('epsilon1', 'above 0', lambda x: x > 0)
    check('epsilon2', 'above 0', lambda x: x > 0)
    check('min_dim_size_to_factor', 'at least 1', lambda x: x >= 1)
    check_if_given('clipping_threshold', 'above 0', lambda x: x > 0)
    check_if_given('global_norm_clip_threshold', 'above 0', lambda x: x > 0)
    check_if_given('weight_decay_rate', 'in [0, 1)', lambda x: 0 <= x < 1)
    check_if_given('weight_decay_rate_lr_exponent', 'above 0', lambda x: x > 0)
    check_if_given('beta1', 'in [0, 1)', lambda x: 0 <= x < 1)

  def factored_axes(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(Smaller, larger) axis of a matrix to factor; None if it is not one."""
    # T5X refuses tensors here unless told their rows and columns. Two axes of
    # a tensor are in general not its best factors: they keep all of v.
    if not self.factored or len(shape) != 2:
      return None
    if min(shape) < self.min_dim_size_to_factor:
      return None
    return (0, 1) if shape[0] <= shape[1] else (1, 0)

  def init_leaf(self, path: tuple[Any, ...], param: Array) -> _Moments:
    """Zero accumulators for one parameter."""
    batched = _has_layers_axis(path)
    if batched and param.ndim == 0:
      raise ValueError(
        f'{jax.tree_util.keystr(path)} is under `layers`, so its first axis '
        'must be the layers; got a scalar.'
      )
    batch, shape = param.shape[:batched], param.shape[batched:]
    m = None if self.beta1 is None else jnp.zeros(param.shape, jnp.float32)
    if (axes := self.factored_axes(shape)) is None:
      return _Moments(v=jnp.zeros(param.shape, jnp.float32), m=m)
    small, large = axes
    v_row = jnp.zeros((*batch, shape[small]), jnp.float32)
    v_col = jnp.zeros((*batch, shape[large]), jnp.float32)
    return _Moments(v_row, v_col, m=m)

  def second_moment_decay(self, count: Int[Array, '']) -> Float[Array, '']:
    """1 - t^-decay_rate for t = count - step_offset + 1."""
    # In float32 like the reference, since 1 - decay is what remains of t^-0.8
    # after rounding: late in pretraining it differs in the third digit.
    t = (count - self.step_offset).astype(jnp.float32) + 1.0
    return 1.0 - t**-self.decay_rate

  def precondition(
    self, grad: Float[Array, '...'], moments: _Moments, decay: Float[Array, '']
  ) -> tuple[Float[Array, '...'], _Moments]:
    """The gradient over the root of its second moment, and the new moments."""
    grad_sqr = grad * grad + self.epsilon1
    mix = 1.0 - decay
    axes = self.factored_axes(grad.shape)
    if axes is None:
      v = decay * moments.v + mix * grad_sqr
      return grad * v**-0.5, moments._replace(v=v)
    small, large = axes
    v_row = decay * moments.v_row + mix * jnp.mean(grad_sqr, axis=large)
    v_col = decay * moments.v_col + mix * jnp.mean(grad_sqr, axis=small)
    row = jnp.expand_dims((v_row / jnp.mean(v_row)) ** -0.5, large)
    col = jnp.expand_dims(v_col**-0.5, small)
    return grad * row * col, moments._replace(v_row=v_row, v_col=v_col)

  def weight_decay(self, learning_rate: Float[Array, '']) -> ArrayLike:
    """The fraction of a parameter that one step removes."""
    if self.weight_decay_rate_lr_exponent is None:
      return self.weight_decay_rate or 0.0
    rate = 1.0 if self.weight_decay_rate is None else self.weight_decay_rate
    return rate * learning_rate**self.weight_decay_rate_lr_exponent

  def update_leaf(
    self,
    param: Float[Array, '...'],
    grad: Float[Array, '...'],
    moments: _Moments,
    learning_rate: Float[Array, ''],
    decay: Float[Array, ''],
  ) -> tuple[Float[Array, '...'], _Moments]:
    """What to add to one parameter, or to one layer of it."""
    value = param.astype(jnp.float32)
    step, moments = self.precondition(grad, moments, decay)
    if self.clipping_threshold is not None:
      step /= jnp.maximum(1.0, _rms(step) / self.clipping_threshold)
    step *= learning_rate
    if self.multiply_by_parameter_scale:
      step *= jnp.maximum(_rms(value), self.epsilon2)
    if self.beta1 is not None:
      step = self.beta1 * moments.m + (1.0 - self.beta1) * step
      moments = moments._replace(m=step)
    step = -step - self.weight_decay(learning_rate) * value
    return step.astype(param.dtype), moments

  def init(self, params: PyTree) -> AdafactorState:
    """The state before the first update."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    moments = [self.init_leaf(path, leaf) for path, leaf in leaves]
    return _state(jnp.asarray(self.initial_step, jnp.int32), treedef, moments)

  def update(
    self,
    updates: PyTree,
    state: AdafactorState,
    params: PyTree | None = None,
    *,
    learning_rate: ArrayLike,
    **_: Any,
  ) -> tuple[PyTree, AdafactorState]:
    """What to add to the parameters, and the next state."""
    if params is None:
      raise ValueError('adafactor needs params: update(grads, state, params).')
    learning_rate = jnp.asarray(learning_rate, jnp.float32)
    decay = self.second_moment_decay(state.count)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    if self.global_norm_clip_threshold is not None:
      clip = optax.clip_by_global_norm(self.global_norm_clip_threshold)
      grads = clip.update(grads, clip.init(params))[0]

    def update_leaf(param, grad, moments):
      return self.update_leaf(param, grad, moments, learning_rate, decay)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    trees = [treedef.flatten_up_to(tree) for tree in (grads, *state[1:])]
    steps, new_moments = [], []
    for (path, param), grad, *moments in zip(leaves, *trees, strict=True):
      fn = jax.vmap(update_leaf) if _has_layers_axis(path) else update_leaf
      step, moment = fn(param, grad, _Moments(*moments))
      steps.append(step)
      new_moments.append(moment)
    count = optax.safe_increment(state.count)
    return treedef.unflatten(steps), _state(count, treedef, new_moments)


def _state(count, treedef, moments: list[_Moments]) -> AdafactorState:
  """The state from the accumulators of each parameter, in tree order."""
  return AdafactorState(
    count,
    *(
      treedef.unflatten([getattr(m, f) for m in moments])
      for f in _Moments._fields
    ),
  )


def adafactor(
  *,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  initial_step: int = 0,
  multiply_by_parameter_scale: bool = True,
  clipping_threshold: float | None = 1.0,
  weight_decay_rate: float | None = None,
  weight_decay_rate_lr_exponent: float | None = None,
  beta1: float | None = None,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  factored: bool = True,
  min_dim_size_to_factor: int = 128,
  global_norm_clip_threshold: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adafactor as T5X has it.

  With t = count - step_offset + 1 and b = 1 - t^-decay_rate:

    v <- b v + (1 - b) (g^2 + epsilon1)
    u = g / sqrt(v);  u <- u / max(1, RMS(u) / clipping_threshold)
    p <- (1 - weight_decay) p - lr * max(RMS(p), epsilon2) * u

  A matrix with both sides at least `min_dim_size_to_factor` keeps only the
  means of v over its rows and over its columns; vectors, smaller matrices and
  tensors keep all of v. Mind that the rule asks for nothing but the size: a
  prompt of 128 or more tokens is factored. **The weight decay is not
  multiplied by the learning rate** (`adamw`'s is).

  A leaf with a path part `layers` is a stack of scanned layers on axis 0, and
  each layer is updated as if it were a parameter of its own.

  Prompt tuning's recipe is a learning rate of 0.3, no parameter scale, a weight
  decay of 1e-5 and, from LM-adapted checkpoints, an initial step of 1,100,000.

  Args:
    decay_rate: exponent of the second moment's decay, in (0, 1].
    step_offset: first step of this phase of training, where b is 0.
    initial_step: count before the first update. The reference goes on from the
      step of the checkpoint that it restores. With zero accumulators that is a
      different optimizer: b is close to 1 at once, so that early updates are
      divided by a root of a sum of squares, and clipped.
    multiply_by_parameter_scale: whether the learning rate is relative to the
      RMS of the parameter.
    clipping_threshold: largest RMS of an update before the learning rate.
    weight_decay_rate: fraction of the parameter removed at each step.
    weight_decay_rate_lr_exponent: if given, `weight_decay_rate` (None: 1) is
      multiplied by the learning rate to this power.
    beta1: decay of the momentum of the updates; None keeps none.
    epsilon1: added to squared gradients.
    epsilon2: smallest parameter scale.
    factored: whether large matrices are factored.
    min_dim_size_to_factor: smallest side of a matrix that is factored.
    global_norm_clip_threshold: largest norm of all gradients together.

  Returns:
    A transformation; `update(grads, state, params, learning_rate=lr)`.

  Raises:
    ValueError: a hyperparameter is out of its range.

  Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 to 6; T5X
    `t5x/adafactor.py`, whose numbers the tests hold.
  """
  hyper = _Adafactor(**locals())  # locals() is exactly the arguments here.
  return _transformation(hyper.init, hyper.update)


def _transformation(
  init: Any, update: Any
) -> optax.GradientTransformationExtraArgs:
  """The pair; optax's protocol cannot say which extra argument is meant."""
  return optax.GradientTransformationExtraArgs(init, update)


def _scaled_by_rate(
  *parts: optax.GradientTransformation,
  global_norm_clip_threshold: float | None,
) -> optax.GradientTransformationExtraArgs:
  """Chains, clips first if asked to, and multiplies by -learning_rate last."""
  if global_norm_clip_threshold is not None:
    threshold = global_norm_clip_threshold
    require(
      threshold > 0, 'global_norm_clip_threshold', 'None or above 0', threshold
    )
    parts = (optax.clip_by_global_norm(threshold), *parts)
  inner = optax.chain(*parts)

  def update(updates, state, params=None, *, learning_rate, **_):
    # optax's Adam raises a float to an integer, which strict promotion rejects.
    with jax.numpy_dtype_promotion('standard'):
      updates, state = inner.update(updates, state, params)
    rate = jnp.asarray(learning_rate, jnp.float32)
    return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), state

  return _transformation(inner.init, update)


def adamw(
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  global_norm_clip_threshold: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam with decoupled weight decay: p <- p - lr * (adam(g) + weight_decay p).

  **The decay is multiplied by the learning rate**, as in optax and PyTorch;
  `adafactor`'s is not. It is off by default.

  Args:
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the second moment.
    weight_decay: fraction of the parameter removed per unit of learning rate.
    global_norm_clip_threshold: largest norm of all gradients together.

  Raises:
    ValueError: a hyperparameter is out of its range.

  Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; the moments
    are optax's.
  """
  require(0 <= b1 < 1, 'b1', 'in [0, 1)', b1)
  require(0 <= b2 < 1, 'b2', 'in [0, 1)', b2)
  require(eps > 0, 'eps', 'above 0', eps)
  require(weight_decay >= 0, 'weight_decay', 'at least 0', weight_decay)
  return _scaled_by_rate(
    optax.scale_by_adam(b1, b2, eps),
    optax.add_decayed_weights(weight_decay),
    global_norm_clip_threshold=global_norm_clip_threshold,
  )


def sgd(
  *,
  momentum: float = 0.0,
  global_norm_clip_threshold: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Gradient descent: m <- momentum m + g; p <- p - lr m.

  Raises:
    ValueError: a hyperparameter is out of its range.
  """
  require(0 <= momentum < 1, 'momentum', 'in [0, 1)', momentum)
  return _scaled_by_rate(
    optax.trace(momentum) if momentum else optax.identity(),
    global_norm_clip_threshold=global_norm_clip_threshold,
  )
