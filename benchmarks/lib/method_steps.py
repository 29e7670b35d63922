"""A method's file at a model's sizes: what its training step counts and takes.

Programs are compiled from shapes alone: nothing here depends on the values of
parameters.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.extend import core
import numpy as np

from lib import closed_form
from lib import method_products
from lib import workers
from prompt_jax import checkpoints
from prompt_jax import export
from prompt_jax import gin_rules
from prompt_jax import gin_utils
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax import trainer
from prompt_jax.methods import base
from prompt_jax.methods import exported
from prompt_jax.methods import saved_prompts

FOLDER = gin_rules.packaged() / 'methods'
# Methods whose step does more where there are prompts of other tasks: the macro
# that takes their files. The others read a file at most for what they start at.
SAVED = {'attempt': 'SOURCES', 'ipt': 'SOURCES', 'mpt_source': 'TEACHERS'}
_SAVED_COUNT, _SAVED_LENGTH = 6, 100
# Own sizes of deltas that `closed_form.Changes` asks for.
_SIZES = {
  'low_rank': lambda table: table[0].shape[-1],
  'bottleneck': lambda table: table.down.shape[-1],
  'parallel': lambda table: table.down.shape[-1],
  'prefix': lambda table: table[0].shape[-3],
}


def names() -> list[str]:
  """Of all methods."""
  return sorted(path.stem for path in FOLDER.glob('*.gin'))


@dataclasses.dataclass(frozen=True)
class Setup:
  """A method on a model.

  Attributes:
    model: network and method.
    optimizer: the method's.
    learning_rate_fn: the method's.
    exportable: its header does not say otherwise.
  """

  model: models.EncoderDecoderModel
  optimizer: Any
  learning_rate_fn: Any
  exportable: bool

  @functools.cached_property
  def network(self) -> Any:
    """Shapes of the network's parameters."""
    return partitioning.unbox(self.model.abstract_network)

  def frozen(self, network: Any, constants: Any) -> Any:
    """What is not trained."""
    frozen = self.model.split(network)[1]
    return {**frozen, 'constants': constants} if constants else frozen

  @functools.cached_property
  def shapes(self) -> tuple[Any, Any]:
    """Of the train state and of what is frozen."""
    init = functools.partial(
      trainer.init_state, model=self.model, optimizer=self.optimizer
    )
    state = jax.eval_shape(init, jax.random.PRNGKey(0), self.network)
    constants = jax.eval_shape(self.model.constants, self.network)
    return state, self.frozen(self.network, partitioning.unbox(constants))

  @functools.cached_property
  def step(self) -> Any:
    """`trainer.train_step` of this model, jitted as a run does."""
    step = functools.partial(
      trainer.train_step,
      model=self.model,
      optimizer=self.optimizer,
      learning_rate_fn=self.learning_rate_fn,
    )
    return jax.jit(step, donate_argnums=0)


def read(name: str, args: argparse.Namespace) -> Setup:
  """The method's file, the model's and `runs/train.gin`.

  Args:
    name: of the method.
    args: `model`, `dropout`, `scan`; `folder` is for files that it needs.
  """
  files = [f'models/{args.model}.gin', f'methods/{name}.gin', 'runs/train.gin']
  flags = [
    "MIXTURE_OR_TASK_NAME=''",
    'TRAIN_STEPS=1000',
    'VOCABULARY=None',
    "VOCABULARY_PATH=''",
    f'DROPOUT_RATE={args.dropout}',
  ]
  if name in SAVED:
    paths = _saved_prompts(args.folder, _width(files, flags))
    flags.append(f'{SAVED[name]}={paths!r}')
  return _build(name, files, flags, args)


def _width(files: Sequence[str], flags: Sequence[str]) -> int:
  """D of the model."""
  files = [files[0], 'methods/fine_tune.gin', *files[2:]]
  try:
    gin_utils.parse(files, flags)
    return gin_utils.build('@t5.T5Config()').emb_dim
  finally:
    gin_utils.clear()


def _saved_prompts(folder: str, width: int) -> tuple[str, ...]:
  """Files of the prompts of other tasks."""
  paths = []
  for i in range(_SAVED_COUNT):
    path = pathlib.Path(folder) / f'{width}_{i}.npy'
    rng = np.random.default_rng(i)
    prompt = rng.standard_normal((_SAVED_LENGTH, width))
    saved_prompts.write(str(path), prompt)
    paths.append(str(path))
  return tuple(paths)


def _build(
  name: str, files: Sequence[str], flags: Sequence[str], args: Any
) -> Setup:
  text = ' '.join((FOLDER / f'{name}.gin').read_text().replace('#', '').split())
  try:
    gin_utils.parse(files, flags)
    model, optimizer, learning_rate_fn = (
      gin_utils.build(f'%{macro}')
      for macro in ('MODEL', 'OPTIMIZER', 'LEARNING_RATE_FN')
    )
  finally:
    gin_utils.clear()
  if not args.scan:
    config = dataclasses.replace(model.config, scan_layers=False)
    model = dataclasses.replace(model, config=config)
  exportable = 'Cannot be exported.' not in text
  return Setup(model, optimizer, learning_rate_fn, exportable)


# ---- shapes ----------------------------------------------------------------


def batch(setup: Setup, args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Rows without padding, tasks in turn, soft tokens in front."""
  inputs, targets = workers.random_batch(
    args.batch, args.inputs, args.targets, setup.model.config.vocab_size
  )
  soft = setup.model.soft_ids
  tasks = np.arange(args.batch, dtype=np.int32) % len(soft)
  out = {
    'encoder_input_tokens': np.concatenate([soft[tasks], inputs], axis=1),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }
  return {**out, 'task_ids': tasks} if len(soft) > 1 else out


def _lengths(data: dict[str, np.ndarray]) -> closed_form.Lengths:
  rows, positions = data['encoder_input_tokens'].shape
  targets = data['decoder_target_tokens'].shape[1]
  return closed_form.Lengths(rows, positions, targets)


def products(
  setup: Setup, data: dict[str, np.ndarray]
) -> list[closed_form.Product]:
  """All products of a step, by arithmetic."""
  model = setup.model
  lengths = _lengths(data)
  context = model.context(setup.network)
  making = method_products.making(model.method, context, lengths)
  if found := base.side_network(model.method):
    side = found[0].network(model.config).side
    return closed_form.ladder(model.config, side, lengths) + making
  return (
    closed_form.network(model.config, lengths, changes(setup, data)) + making
  )


def with_kernel_gradients(
  setup: Setup, data: dict[str, np.ndarray]
) -> list[closed_form.Product] | None:
  """The products of a step that formed the gradients of kernels under LoRA.

  None where there is no change of low rank.
  """
  laid = changes(setup, data)
  kernels = [
    f'{path.removesuffix("/low_rank")}/kernel'
    for path in laid.laid
    if path.endswith('/low_rank')
  ]
  if not kernels:
    return None
  whole = closed_form.Changes(laid.laid, {*(laid.trained or ()), *kernels})
  found = closed_form.network(setup.model.config, _lengths(data), whole)
  same = {product.name: product for product in products(setup, data)}
  return list((same | {product.name: product for product in found}).values())


def changes(setup: Setup, data: dict[str, np.ndarray]) -> closed_form.Changes:
  """What the method lays on the network, and what of that it trains."""
  state, frozen = setup.shapes

  def lay(trainable: Any, frozen: Any, data: Any) -> Any:
    return setup.model.lay(frozen, trainable, data)[1]

  laid = jax.eval_shape(lay, state.trainable, frozen, data)
  sizes = {}
  for path, delta in laid.items():
    size = _SIZES.get(path.rsplit('/', 1)[-1], lambda _: 1)
    sizes[path] = size(delta.table)
  return closed_form.Changes(
    sizes, set(train_state.flatten(state.trainable['network']))
  )


def saved(setup: Setup, folder: str) -> dict[str, int | None]:
  """Numbers and bytes of `trainable.safetensors`, and of what is exported."""
  state, frozen = setup.shapes
  trainable = zeros(state.trainable)
  numbers, size = _written(trainable, {}, folder)
  out: dict[str, int | None] = {'trained': numbers, 'trained_bytes': size}
  if not setup.exportable:
    return {**out, 'deployed': None, 'deployed_bytes': None}
  deployed = functools.partial(export.deployed, setup.model)
  laid = zeros(jax.eval_shape(deployed, frozen, state.trainable))
  ids = setup.model.soft_ids - setup.model.config.vocab_size
  arrays, header = exported.pack(laid, ids)
  found = {'method': arrays, 'network': trainable['network']}
  numbers, size = _written(found, {'exported': header}, folder)
  return {**out, 'deployed': numbers, 'deployed_bytes': size}


def zeros(shapes: Any) -> Any:
  """Arrays of these shapes."""
  return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def _written(tree: Any, header: Any, folder: str) -> tuple[int, int]:
  path = pathlib.Path(folder) / exported.FILE
  checkpoints.save_trainable(path, tree, header)
  size = path.stat().st_size
  path.unlink()
  return sum(x.size for x in jax.tree.leaves(tree)), size


# ---- programs --------------------------------------------------------------


def compiled(setup: Setup, data: dict[str, np.ndarray]) -> tuple[Any, Any]:
  """The step's program, and the jaxpr that it was made of."""
  traced = setup.step.trace(*setup.shapes, data)
  return traced.lower().compile(), traced.jaxpr


def counted(program: Any, jaxpr: Any) -> float:
  """The compiler's FLOPs, the bodies of loops as often as they run."""
  return program.cost_analysis()['flops'] + _more(jaxpr.jaxpr)


def _more(jaxpr: core.Jaxpr) -> float:
  """What the compiler leaves out: of a loop's n rounds it counts one.

  Each body is compiled alone. Loops that a primitive's own lowering makes, as
  that of random bits on a CPU, are not seen here; they have no products.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [
      x.jaxpr if isinstance(x, core.ClosedJaxpr) else x
      for value in eqn.params.values()
      for x in (value if isinstance(value, tuple | list) else (value,))
      if isinstance(x, core.ClosedJaxpr | core.Jaxpr)
    ]
    more = sum(map(_more, inner))
    if eqn.primitive.name == 'scan':
      length, seen = eqn.params['length'], int(eqn.params['unroll'])
      more *= length
      if length > seen:
        more += (length - seen) * _flops(eqn.params['jaxpr'])
    elif eqn.primitive.name == 'while' and more:
      raise NotImplementedError('a loop in a loop of unknown length')
    total += more
  return total


def _flops(body: core.ClosedJaxpr) -> float:
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
  program: Any = jax.jit(core.jaxpr_as_fun(body)).lower(*shapes).compile()
  return program.cost_analysis()['flops']


def memory(program: Any) -> dict[str, int]:
  """Bytes of a step as the compiler has planned them.

  `peak`: arguments, results that are not put in an argument's place, and
  `scratch`, which holds activations and gradients.
  """
  found = program.memory_analysis()
  scratch = found.temp_size_in_bytes
  new = found.output_size_in_bytes - found.alias_size_in_bytes
  return {
    'peak_bytes': found.argument_size_in_bytes + new + scratch,
    'scratch_bytes': scratch,
  }
