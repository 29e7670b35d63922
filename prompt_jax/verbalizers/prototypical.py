"""ProtoVerb: labels as vectors, learned by contrast from states at the blank.

With h_i the hidden state at the blank of example i of N, v_i = h_i W, c_k the
prototype of label k of C, y_i the label of i, and s(a, b) the cosine:

    L_proto = - 1/(N C) sum_i log e^s(v_i, c_y_i) / sum_k e^s(v_i, c_k)
    L_inst  = - 1/N^2 sum_a,b log e^s(a, b) / (e^s(a, b) + sum_a' e^s(a', b))

where a and b are examples of one label (a = b among them) and a' those of the
others. The states are `states.at_blank`'s.

Source: Cui et al. 2022, arXiv 2203.09770, section 3, as known from the paper;
checked against thunlp/OpenPrompt
`openprompt/prompts/prototypical_verbalizer.py`, which divides so, and has no
temperature.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax


@flax.struct.dataclass
class Prototypes:
  """What is learned.

  Attributes:
    projection: W, [D, M].
    prototypes: [C, M], a label each.
  """

  projection: Any
  prototypes: Any


def init(rng: Any, emb_dim: int, labels: int, dim: int = 64) -> Prototypes:
  """Random ones.

  Args:
    rng: a key.
    emb_dim: D, of the hidden states.
    labels: C.
    dim: M.
  """
  keys = jax.random.split(rng)
  bound = emb_dim**-0.5  # a linear layer's, as torch has it
  xavier = jax.nn.initializers.glorot_uniform()
  return Prototypes(
    jax.random.uniform(keys[0], (emb_dim, dim), jnp.float32, -bound, bound),
    xavier(keys[1], (labels, dim), jnp.float32),
  )


def cosines(
  a: Float[Array, 'N M'], b: Float[Array, 'K M']
) -> Float[Array, 'N K']:
  """s(a_n, b_k)."""

  def unit(x: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
    return x / norm

  return unit(jnp.asarray(a)) @ unit(jnp.asarray(b)).T


def prototype_loss(
  v: Float[Array, 'N M'],
  labels: Int[Array, ' N'],
  prototypes: Float[Array, 'C M'],
) -> Float[Array, '']:
  """L_proto, of an instance and the prototypes."""
  logs = jax.nn.log_softmax(cosines(v, prototypes), axis=-1)
  own = jnp.take_along_axis(logs, labels[:, None], axis=-1)
  return -jnp.mean(own) / len(prototypes)


def instance_loss(
  v: Float[Array, 'N M'], labels: Int[Array, ' N']
) -> Float[Array, '']:
  """L_inst, of instances and each other; the sum of pairs over N^2."""
  e = jnp.exp(cosines(v, v))
  same = labels[:, None] == labels[None]
  others = jnp.sum(jnp.where(same, 0.0, e), axis=0)  # of b, over a'
  each = -jnp.log(e / (e + others))
  return jnp.sum(jnp.where(same, each, 0.0)) / e.size


def loss(
  params: Prototypes, states: Float[Array, 'N D'], labels: Int[Array, ' N']
) -> Float[Array, '']:
  """L_inst + L_proto."""
  v = jnp.asarray(states) @ params.projection
  return instance_loss(v, labels) + prototype_loss(v, labels, params.prototypes)


def fit(
  params: Prototypes,
  states: Float[Array, 'N D'],
  labels: Int[Array, ' N'],
  steps: int = 100,
  learning_rate: float = 1e-3,
) -> Prototypes:
  """Trains on the states of a frozen model, each step on all, with Adam.

  Raises:
    ValueError: a label without an example, or states of another width.
  """
  wanted = params.projection.shape[0]
  if states.ndim != 2 or states.shape[1] != wanted:
    raise ValueError(
      f'states must be [examples, {wanted}], got {states.shape}.'
    )
  missing = set(range(len(params.prototypes))) - set(
    np.asarray(labels).tolist()
  )
  if missing:
    raise ValueError(
      f'There is no example of the labels {sorted(missing)}, so their '
      'prototypes cannot be learned.'
    )
  optimizer = optax.adam(learning_rate)
  labels = jnp.asarray(labels)

  def step(_: int, carry: Any) -> Any:
    params, state = carry
    gradient: Any = jax.grad(loss)(params, states, labels)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state

  tree: Any = params  # optax's type of a tree knows no dataclass
  start = params, optimizer.init(tree)
  return jax.lax.fori_loop(0, steps, step, start)[0]


def scores(
  params: Prototypes, states: Float[Array, 'N D']
) -> Float[Array, 'N C']:
  """The cosine with each label's prototype."""
  v = jnp.asarray(states) @ params.projection
  return cosines(v, params.prototypes)


def combined(*all_scores: Float[Array, 'N C']) -> Float[Array, 'N C']:
  """Verbalizers together: each z-scored over the labels, and averaged."""

  def z(x: Array) -> Array:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    deviation = jnp.std(x, axis=-1, keepdims=True)
    return (x - mean) / jnp.where(deviation > 0, deviation, 1.0)

  return sum(map(z, all_scores), jnp.zeros(())) / len(all_scores)
