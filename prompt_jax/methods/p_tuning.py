"""P-tuning (Liu et al. 2021): soft tokens that a small network encodes."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import projections
from prompt_jax.network import layers

ENCODERS = ('lstm', 'mlp', 'identity')
_DIRECTIONS = ('forward', 'backward')


class PTuning(nn.Module):
  """Soft tokens whose embeddings are `encode(prompt[g])`, [P, D].

  With E = `prompt[g]` [P, D], one row a soft token, in their order:

      lstm      relu(bilstm(bilstm(E)) W + b) W' + b'
      mlp       relu(E W + b) W' + b'
      identity  E, which is prompt tuning

  One direction of a bilstm, of width h, with its state (c, s) starting at 0:

      i, f, g, o = x W_in + b_in + s W_state + b_state      (each of width h)
      c <- sigmoid(f) c + sigmoid(i) tanh(g);   s <- sigmoid(o) tanh(c)

  The encoder sees nothing of the batch: what it makes can be exported, and it
  is not needed any more. Where the soft tokens stand is the data's business:
  P-tuning's templates have them anywhere, through `<soft:k>` in the text, and
  ordinary words between them, which are frozen ("anchors").

  Attributes:
    length: P, soft tokens of one task.
    encoder: 'lstm', 'mlp' or 'identity'.
    hidden_dim: h; None for D // 2, as the code for LAMA has it. That for
      SuperGLUE has D.
    num_tasks: G, tables E kept apart; the encoder is shared.

  Raises:
    ValueError: a size below 1, an unknown encoder, or a `hidden_dim` for an
      encoder that has none.

  Source: Liu et al. 2021, arXiv 2103.10385, section 3; sizes and initial values
  by THUDM/P-tuning `LAMA/p_tuning/prompt_encoder.py` and
  `PT-Fewshot/pet/wrapper.py`. As torch has them, a gate has two biases, which
  counts 16 h numbers more than flax's cell would.
  """

  length: int = 9
  encoder: str = 'lstm'
  hidden_dim: int | None = None
  num_tasks: int = 1

  def __post_init__(self):
    sizes = () if self.hidden_dim is None else ('hidden_dim',)
    projections.check_whole_numbers(self, 'length', 'num_tasks', *sizes)
    if self.encoder not in ENCODERS:
      raise ValueError(
        f'PTuning.encoder must be one of {", ".join(ENCODERS)}, got '
        f'{self.encoder!r}.{deltas.near_misses(str(self.encoder), ENCODERS)}'
      )
    if self.hidden_dim is not None and self.encoder != 'lstm':
      raise ValueError(
        f'PTuning.hidden_dim is the width of the lstm, which the encoder '
        f'{self.encoder!r} has not; leave it out.'
      )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, self.length

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the encoded prompts on the token embedding."""
    width = context.config.emb_dim
    shape: tuple[int, ...] = (self.length, width)
    axes: tuple[str, ...] = ('prompt', 'prompt_embed')
    if self.num_tasks > 1:
      shape, axes = (self.num_tasks, *shape), ('task', *axes)
    normal = nn.initializers.normal(1.0)
    x = layers.param(self, 'prompt', normal, shape, axes)
    x = x.reshape(-1, self.length, width)
    hidden = width
    if self.encoder == 'lstm':
      half = self.hidden_dim or max(width // 2, 1)
      hidden = 2 * half
      x = self._bilstms(x, half)
    if self.encoder != 'identity':
      x = self._mlp(x, hidden, width)
    rows = x.reshape(1, -1, width)
    return {f'{context.embedder}/rows': deltas.Routed(rows)}

  def _bilstms(
    self, x: Float[Array, 'G P D'], hidden: int
  ) -> Float[Array, 'G P E']:
    """Two layers, each of both directions."""
    bound = hidden**-0.5  # of all weights and biases, as torch has it
    specs = {}
    for layer, width in enumerate((x.shape[-1], 2 * hidden)):
      for way in _DIRECTIONS:
        for name, inputs in (('input', width), ('state', hidden)):
          path = f'lstm/{layer}/{way}/{name}'
          specs |= _dense(path, inputs, 4 * hidden, bound)
    params = base.params_at(self, specs)
    for layer in range(2):
      both = [
        _lstm(x, params, f'lstm/{layer}/{way}', reverse=way == 'backward')
        for way in _DIRECTIONS
      ]
      x = jnp.concatenate(both, axis=-1)
    return x

  def _mlp(
    self, x: Float[Array, 'G P E'], inputs: int, width: int
  ) -> Float[Array, 'G P D']:
    specs = _dense('mlp/0', inputs, width, inputs**-0.5)
    specs |= _dense('mlp/1', width, width, width**-0.5)
    params = base.params_at(self, specs)
    return _affine(nn.relu(_affine(x, params, 'mlp/0')), params, 'mlp/1')


def _dense(
  path: str, inputs: int, outputs: int, bound: float
) -> dict[str, tuple[Any, tuple[int, ...], tuple[str | None, ...]]]:
  """Kernel and bias, uniform in [-bound, bound), for `base.params_at`."""

  def init(rng: Any, shape: Any, dtype: Any) -> Any:
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  axes = (None, 'prompt_embed')
  return {
    f'{path}/kernel': (init, (inputs, outputs), axes),
    f'{path}/bias': (init, (outputs,), axes[1:]),
  }


def _affine(x: Array, params: dict[str, Any], path: str) -> Array:
  return x @ params[f'{path}/kernel'] + params[f'{path}/bias']


def _lstm(
  x: Float[Array, 'G P D'], params: dict[str, Any], path: str, reverse: bool
) -> Float[Array, 'G P E']:
  """One direction; gates stand in torch's order, i, f, g, o."""
  # What comes from the input does not wait for the state.
  inputs = jnp.moveaxis(_affine(x, params, f'{path}/input'), 1, 0)

  def step(carry: Any, z: Any) -> Any:
    cell, state = carry
    gates = jnp.split(z + _affine(state, params, f'{path}/state'), 4, axis=-1)
    i, f, o = (nn.sigmoid(gates[k]) for k in (0, 1, 3))
    cell = f * cell + i * jnp.tanh(gates[2])
    state = o * jnp.tanh(cell)
    return (cell, state), state

  hidden = inputs.shape[-1] // 4
  zeros = jnp.zeros((x.shape[0], hidden), x.dtype)
  _, found = jax.lax.scan(step, (zeros, zeros), inputs, reverse=reverse)
  return jnp.moveaxis(found, 0, 1)
