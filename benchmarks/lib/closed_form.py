"""What the matrix products of a training step must cost, by arithmetic.

A product `y = x w` of n x D and D x E numbers takes 2 n D E operations. Its
backward pass takes as many for the gradient of x, if x depends on anything that
is trained, and as many for that of w, if w does:

    2 n D E (1 + [x is reached by what is trained] + [w is])

A step costs the sum of this over all products of the network, of what a method
lays on it, and of what makes that (`method_products.py`). So each method pays

-   forward: all products of the network, and those of its deltas;
-   backward, towards activations: from the loss down to the lowest place where
    it changes anything, and not below it (a prompt: all of the encoder, and of
    the decoder what reads it; layers: the layers);
-   gradients of weights: of what it trains alone. LoRA's are those of A and B:
    a frozen W has `w` False, so its gradient [D, E] is no part of the sum.

With n = B T positions of the encoder (soft tokens are positions), m = B U of
the decoder, S and Z keys of self- and of cross-attention, prefixes included,
all products of a T5 are

    encoder layer   4 n D HK + 2 n S HK + (2 or 3) n D F
    decoder layer   4 m D HK + 2 m S HK + (2 or 3) m D F
                    + 2 m D HK + 2 n D HK + 2 m Z HK (cross-attention)
    logits          m D V

each times 2 (1 + [x] + [w]). Deltas add, on N positions:

    low_rank        N D R (x, A),  N R E (x A, B)
    bottleneck      N D M (its input, A),  N M D (f, B); parallel likewise
    kernel          nothing: W' is added to W, whose gradient is then needed
    prefix          its P slots are among the keys; keys and values depend
    rows, hidden, scale, shift, preceding: no product; what is behind depends

No soft tokens stand in the decoder, so nothing below its first product with
something trained is reached. What is no product is not counted: norms, softmax,
activations, dropout, the loss, the optimizer.
"""

from collections.abc import Collection, Mapping
import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Product:
  """`y = x w`.

  Attributes:
    name: where.
    size: multiplications in the forward pass.
    x: x depends on something trained.
    w: w does.
  """

  name: str
  size: int
  x: bool = False
  w: bool = False

  @property
  def flops(self) -> int:
    """Of forward and backward pass."""
    return 2 * self.size * (1 + self.x + self.w)


@dataclasses.dataclass(frozen=True)
class Lengths:
  """B, T with soft tokens, and U."""

  batch: int
  encoder: int
  decoder: int


@dataclasses.dataclass(frozen=True)
class Changes:
  """What is trained of a network, and what is laid on it.

  Attributes:
    laid: path of a delta -> its own size: R of `low_rank`, M of an adapter,
      P of `prefix`; of other kinds it does not matter.
    trained: paths of the network's own parameters that are trained; None: all.
  """

  laid: Mapping[str, int] = dataclasses.field(default_factory=dict)
  trained: Collection[str] | None = ()

  def size(self, path: str) -> int:
    """Of the delta at a path; 0 for none."""
    return self.laid.get(path) or self.laid.get(_stacked(path), 0)

  def trains(self, path: str) -> bool:
    """Whether that parameter is."""
    if self.trained is None:
      return True
    return path in self.trained or _stacked(path) in self.trained


def _stacked(path: str) -> str:
  """The path that layer i has where layers are scanned."""
  return re.sub(r'/layers_\d+', '/layers', path)


def flops(products: Collection[Product]) -> int:
  """Of a whole step."""
  return sum(product.flops for product in products)


def network(config: Any, lengths: Lengths, changes: Changes) -> list[Product]:
  """All products of a T5 with deltas.

  Args:
    config: a `T5Config` with an encoder.
    lengths: of the batch.
    changes: by a method.
  """
  return _Network(config, lengths, changes).products()


def ladder(config: Any, side: Any, lengths: Lengths) -> list[Product]:
  """All products of LST.

  The frozen network's, forward, without its logits, which nobody reads; and of
  the side network, all of which is trained, with D -> d at its inputs and at
  each layer (of what is frozen), and d -> D in front of the frozen logits.
  """
  wide = [p for p in network(config, lengths, Changes()) if p.name != 'logits']
  narrow = _Network(side, lengths, Changes(trained=None), config.emb_dim)
  return wide + narrow.products()


class _Network:
  """Walks through a T5; the flags say what depends on something trained."""

  def __init__(
    self, config: Any, lengths: Lengths, changes: Changes, wide: int = 0
  ):
    self._config, self._lengths, self._changes = config, lengths, changes
    self._wide = wide  # of the frozen network that a side network reads
    self._found: list[Product] = []

  def products(self) -> list[Product]:
    c, embedder = self._config, 'token_embedder'
    trained = self._changes.trains(f'{embedder}/embedding') and not self._wide
    soft = bool(self._changes.size(f'{embedder}/rows'))
    encoded = self._stack('encoder', trained or soft)
    x = self._stack('decoder', trained, encoded)
    rows = self._lengths.batch * self._lengths.decoder
    if self._wide:
      self._add('up', rows * c.emb_dim * self._wide, x, True)
      self._add('logits', rows * self._wide * c.vocab_size, True)
      return self._found
    tied = c.logits_via_embedding
    head = f'{embedder}/embedding' if tied else 'decoder/logits_dense/kernel'
    head_trained = self._changes.trains(head)
    self._add('logits', rows * c.emb_dim * c.vocab_size, x, head_trained)
    return self._found

  def _add(self, name: str, size: int, x: bool, w: bool = False) -> None:
    self._found.append(Product(name, size, x, w))

  def _stack(self, stack: str, x: bool, encoded: bool | None = None) -> bool:
    c, lengths = self._config, self._lengths
    here = getattr(lengths, stack)
    rows = lengths.batch * here
    bias = self._changes.trains(f'{stack}/relpos_bias/rel_embedding')
    own = 'attention' if encoded is None else 'self_attention'
    if self._wide:
      self._add(f'{stack}/down', rows * self._wide * c.emb_dim, False, True)
      x = True
    for i in range(getattr(c, f'num_{stack}_layers')):
      layer = f'{stack}/layers_{i}'
      if self._wide:
        self._add(f'{layer}/down', rows * self._wide * c.emb_dim, False, True)
      x |= bool(self._changes.size(f'{layer}/hidden'))
      h = self._norm(f'{layer}/pre_{own}_layer_norm', x)
      x |= self._attention(f'{layer}/{own}', h, h, bias, here, here)
      if encoded is not None:
        h = self._norm(f'{layer}/pre_cross_attention_layer_norm', x)
        path, keys = f'{layer}/encoder_decoder_attention', lengths.encoder
        x |= self._attention(path, h, encoded, False, here, keys)
      h = self._norm(f'{layer}/pre_mlp_layer_norm', x)
      x |= self._mlp(f'{layer}/mlp', rows, h)
    return self._norm(f'{stack}/{stack}_norm', x)

  def _norm(self, path: str, x: bool) -> bool:
    return x or self._changes.trains(f'{path}/scale')

  def _dense(self, path: str, rows: int, d: int, e: int, x: bool) -> bool:
    size = self._changes.size
    w = self._changes.trains(f'{path}/kernel') or bool(size(f'{path}/kernel'))
    self._add(path, rows * d * e, x, w)
    if rank := size(f'{path}/low_rank'):
      self._add(f'{path}/A', rows * d * rank, x, True)
      self._add(f'{path}/B', rows * rank * e, True, True)
    laid = any(size(f'{path}/{k}') for k in ('low_rank', 'scale', 'shift'))
    return x or w or laid

  def _attention(
    self, path: str, x: bool, context: bool, bias: bool, here: int, keys: int
  ) -> bool:
    c, batch = self._config, self._lengths.batch
    d, width = c.emb_dim, c.num_heads * c.head_dim
    q = self._dense(f'{path}/query', batch * here, d, width, x)
    k = self._dense(f'{path}/key', batch * keys, d, width, context)
    v = self._dense(f'{path}/value', batch * keys, d, width, context)
    if prefix := self._changes.size(f'{path}/prefix'):
      keys, k, v = keys + prefix, True, True
    self._add(f'{path}/logits', batch * here * keys * width, q, k)
    weights = q or k or bias
    self._add(f'{path}/values', batch * here * keys * width, weights, v)
    y = self._dense(f'{path}/out', batch * here, width, d, weights or v)
    return self._sublayer(path, batch * here, x, y)

  def _mlp(self, path: str, rows: int, x: bool) -> bool:
    c = self._config
    gates = len(c.mlp_activations)
    names = ['wi'] if gates == 1 else [f'wi_{i}' for i in range(gates)]
    shape = rows, c.emb_dim, c.mlp_dim
    h = [self._dense(f'{path}/{name}', *shape, x) for name in names]
    y = self._dense(f'{path}/wo', rows, c.mlp_dim, c.emb_dim, any(h))
    return self._sublayer(path, rows, x, y)

  def _sublayer(self, path: str, rows: int, x: bool, y: bool) -> bool:
    for kind in ('parallel', 'bottleneck'):
      if width := self._changes.size(f'{path}/{kind}'):
        size = rows * self._config.emb_dim * width
        self._add(f'{path}/{kind}/down', size, x if kind == 'parallel' else y,
                  True)  # fmt: skip
        self._add(f'{path}/{kind}/up', size, True, True)
        y = True
    return y
