"""What it must cost to make a method's deltas, product by product.

By the name of the method's class. Methods that are not here make theirs without
a product. The rule is that of `closed_form.py`; the sizes are those of the
equations in each method's docstring. On B examples and a network of width D:

    PrefixTuning    of each attention, with an MLP: P D M, P M 2LHK (both sides
                    trained)
    PTuning         mlp: 2 P D^2; lstm besides: for both layers and directions
                    P (inputs + h) 4h
    MPT             G P R D (u v); with teachers one forward pass besides
    Subspace (IPT)  S P D q (of prompts that are frozen), S q h, S h P D
    SubspacePrompt  G q h, G h P D, with frozen weights
    Attempt         B D M twice, B D S (keys are frozen), B S P D (sources are)
    Compacter       of each projection S_i T_i, D M R / n; their sum with the
                    A_i, n D M
    LoRA            only DoRA: R D E + R^2 (D + E) for the lengths of columns,
                    which count as constant: forward alone
    Intrinsic...    two Walsh-Hadamard transforms, N log2 N additions each, of
                    the powers of two that hold q and the numbers moved; again
                    backward. (Drawing the random numbers is no product.)
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

from lib import closed_form
from lib.closed_form import Product
from prompt_jax.methods import activations
from prompt_jax.methods import base

_Makes = Callable[[Any, Any, closed_form.Lengths], list[Product]]


def making(
  method: Any, context: base.Context, lengths: closed_form.Lengths
) -> list[Product]:
  """The products with which a method makes its deltas in a training step.

  Args:
    method: a linen module, or None.
    context: of the network.
    lengths: of the batch.
  """
  if isinstance(method, base.Chain):
    return [
      product
      for part in method.methods.values()
      for product in making(part, context, lengths)
    ]
  makes = _MAKES.get(type(method).__name__)
  return makes(method, context, lengths) if makes else []


def _prefix_tuning(m: Any, context: Any, _: Any) -> list[Product]:
  c, out = context.config, []
  if m.mlp_dim is None:
    return out
  for name in m.attentions:
    width = 2 * activations.num_layers(c, name) * c.num_heads * c.head_dim
    rows = m.num_tasks * m.length * m.mlp_dim
    out.append(Product(f'{name}/wi', rows * c.emb_dim, True, True))
    out.append(Product(f'{name}/wo', rows * width, True, True))
  return out


def _p_tuning(m: Any, context: Any, _: Any) -> list[Product]:
  d, rows, out = context.config.emb_dim, m.num_tasks * m.length, []
  if m.encoder == 'identity':
    return out
  hidden = d
  if m.encoder == 'lstm':
    half = m.hidden_dim or max(d // 2, 1)
    hidden = 2 * half
    for layer, inputs in enumerate((d, hidden)):
      size = 2 * rows * (inputs + half) * 4 * half
      out.append(Product(f'lstm/{layer}', size, True, True))
  out.append(Product('mlp/0', rows * hidden * d, True, True))
  return [*out, Product('mlp/1', rows * d * d, True, True)]


def _mpt(m: Any, context: Any, lengths: closed_form.Lengths) -> list[Product]:
  c = context.config
  size = m.num_tasks * m.length * m.rank * c.emb_dim
  taught: list[Product] = []
  if m.teachers:
    taught = closed_form.network(c, lengths, closed_form.Changes())
  return [Product('u v', size, True, True), *taught]


def _subspace(m: Any, context: Any, _: Any) -> list[Product]:
  size, tasks = m.length * context.config.emb_dim, m.soft_tokens[0]
  return [
    Product('encoder', tasks * size * m.dimension, False, True),
    Product('hidden', tasks * m.dimension * m.hidden_dim, True, True),
    Product('out', tasks * m.hidden_dim * size, True, True),
  ]


def _subspace_prompt(m: Any, context: Any, _: Any) -> list[Product]:
  size = m.length * context.config.emb_dim
  hidden = m.num_tasks * m.hidden_dim
  return [
    Product('hidden', m.dimension * hidden, True),
    Product('out', hidden * size, True),
  ]


def _attempt(
  m: Any, context: Any, lengths: closed_form.Lengths
) -> list[Product]:
  d, batch, sources = context.config.emb_dim, lengths.batch, len(m.sources)
  return [
    Product('down', batch * d * m.hidden_dim, False, True),
    Product('up', batch * m.hidden_dim * d, True, True),
    Product('keys', batch * d * sources, True),
    Product('mixture', batch * sources * m.length * d, True),
  ]


def _compacter(m: Any, context: Any, _: Any) -> list[Product]:
  c, n, out = context.config, m.phm_dim, []
  size = c.emb_dim * (c.emb_dim // m.reduction_factor)
  places = sum(
    site.shape[0] if len(site.shape) == 3 else 1
    for site in context.sites
    if site.path.endswith(('/out', '/wo'))
    and any(re.fullmatch(p, site.path.rpartition('/')[0]) for p in m.targets)
  )
  for way in ('down', 'up'):
    out.append(Product(way, places * size * m.phm_rank // n, True, True))
    out.append(Product(f'{way}/sum', places * size * n, True, True))
  return out


def _dora(m: Any, context: Any, _: Any) -> list[Product]:
  if not m.dora:
    return []
  out = []
  for site in _sites(m.targets, context):
    *layers, d, e = site.shape
    size = m.rank * d * e + m.rank**2 * (d + e)
    size *= math.prod(layers) * m.num_tasks
    out.append(Product(f'{site.path}/lengths', size))
  return out


def _sites(targets: str | Sequence[str], context: Any) -> list[base.Site]:
  patterns = (targets,) if isinstance(targets, str) else targets
  found = {s.path: s for p in patterns for s in context.match(p)}
  return list(found.values())


def _transforms(name: str, q: int, size: int, times: int) -> Product:
  """Additions; a product of half as many numbers has as many operations."""
  inner = 1 << (q - 1).bit_length()
  n = max(inner, 1 << (size - 1).bit_length())
  additions = n * int(math.log2(n)) + inner * int(math.log2(inner))
  return Product(name, times * additions // 2, True)


def _intrinsic_prompt(m: Any, context: Any, _: Any) -> list[Product]:
  size = m.length * context.config.emb_dim
  return [_transforms('prompt', m.dimension, size, m.num_tasks)]


def _intrinsic_model(m: Any, context: Any, _: Any) -> list[Product]:
  sites = _sites(m.targets, context)
  counts = [math.prod(site.shape[:-2]) for site in sites]
  q = m.dimension - (sum(counts) if m.structure_aware else 0)
  return [
    _transforms(
      site.path, q, site.shape[-2] * site.shape[-1], count * m.num_tasks
    )
    for site, count in zip(sites, counts, strict=True)
  ]


_MAKES: dict[str, _Makes] = {
  'Attempt': _attempt,
  'Compacter': _compacter,
  'IntrinsicModel': _intrinsic_model,
  'IntrinsicPrompt': _intrinsic_prompt,
  'LoRA': _dora,
  'MPT': _mpt,
  'PTuning': _p_tuning,
  'PrefixTuning': _prefix_tuning,
  'Subspace': _subspace,
  'SubspacePrompt': _subspace_prompt,
}
