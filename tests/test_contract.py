"""What holds for every method: each `gin_configs/methods/*.gin` is tested.

A new method's file is found by itself. Two facts are read from its header:
`Trained parameters ... small 51,200; base ...` for T5 1.1, and the sentence
`Starts at the frozen model.` where that is so. What is particular to a method
is tested beside it, in tests/methods.
"""

import dataclasses
import functools
import re

import contract
from contract import LENGTHS
from contract import ROWS
from contract import STEPS
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import run as run_lib
from prompt_jax import train_state
from prompt_jax import trainer
from prompt_jax.methods import base
from prompt_jax.methods.soft_prompt import SoftPrompt

METHODS = sorted(path.stem for path in contract.FOLDER.glob('*.gin'))
assert {'soft_prompt', 'fine_tune'} <= set(METHODS)
SIZES = ('small', 'base', 'large', 'xl', 'xxl')
TASKS = 3
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}

every_method = pytest.mark.parametrize('name', METHODS)


def same_trees(got, want, **close):
  got, want = train_state.flatten(got), train_state.flatten(want)
  assert got.keys() == want.keys()
  for path in want:
    if close:
      np.testing.assert_allclose(got[path], want[path], **close, err_msg=path)
    else:
      np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def paths(trainable):
  return train_state.flatten(trainable).keys()


# ---- what is trained -------------------------------------------------------


@every_method
def test_parameter_count_is_as_declared(name):
  for size in SIZES:
    flags = ['VOCABULARY=None', 'VOCABULARY_PATH=nowhere']
    [model] = contract.build(
      ['%MODEL'], f'models/t5_1_1_{size}.gin', name, flags
    )
    network = partitioning.unbox(model.abstract_network)
    method = jax.eval_shape(model.init_method, jax.random.PRNGKey(0), network)
    trained = jax.tree.leaves(
      (partitioning.unbox(method), model.split(network)[0])
    )
    declared = rf'Trained parameters.*?\b{size} ([\d,]+)'
    said = re.search(declared, contract.header(name))
    assert said, f'methods/{name}.gin: no number of parameters of {size}'
    assert sum(x.size for x in trained) == int(said[1].replace(',', ''))


@every_method
def test_starts_at_the_frozen_model_where_its_header_says_so(name):
  s = contract.setup(name)
  bare = models.EncoderDecoderModel(s.model.config)
  plain = contract.convert(bare, contract.examples(0))
  want = contract.jit(bare.logits)(contract.params(), helpers.NOTHING, plain)
  got = s.logits(s.frozen, s.start().trainable, s.batches[0])
  if 'Starts at the frozen model.' in contract.header(name):
    np.testing.assert_allclose(got, want, **CLOSE)
  else:
    assert np.abs(got - want).max() > 1e-3, 'then its header should say so'


@every_method
def test_only_trainables_move(name):
  s = contract.setup(name)
  before = contract.on_host(contract.params())
  (first, _), *_, (last, metrics) = s.trajectory
  same_trees(contract.params(), before)
  same_trees(s.frozen, s.freeze(before))
  assert last.step == STEPS and metrics['finite']
  assert paths(last.trainable) == paths(first.trainable)
  start = train_state.flatten(first.trainable)
  for path, x in train_state.flatten(last.trainable).items():
    assert x.dtype == np.float32 and (x != start[path]).any(), path


@every_method
def test_every_trainable_gets_a_gradient(name):
  s = contract.setup(name)
  _, found = s.unpacked
  for path, x in train_state.flatten(found).items():
    assert np.isfinite(x).all(), path
    assert (x != 0).any(), f'{path} gets no gradient'


class Watched:
  """A model that notes the parameters to which a step sends gradients."""

  def __init__(self, model):
    self.model, self.seen = model, set()
    self.loss_normalizing_factor = model.loss_normalizing_factor

  def watch(self, tree):
    def note(path, x):
      same = jax.custom_vjp(lambda x: x)

      def backward(_, gradient):
        names = jax.tree_util.keystr(path, simple=True, separator='/')
        self.seen.add(names)
        return (gradient,)

      same.defvjp(lambda x: (x, None), backward)
      return same(x)

    return jax.tree_util.tree_map_with_path(note, tree)

  def loss_fn(self, frozen, trainable, *args):
    trainable = self.watch(trainable)
    return self.model.loss_fn(self.watch(frozen), trainable, *args)


@every_method
def test_no_gradient_of_a_frozen_leaf_is_formed(name):
  s = contract.setup(name)
  watched = Watched(s.model)
  start = s.start()
  step = functools.partial(
    trainer.train_step,
    model=watched,  # pyright: ignore
    optimizer=s.optimizer,
    learning_rate_fn=s.learning_rate_fn,
  )
  jax.eval_shape(step, start, s.frozen, s.batches[0])
  assert watched.seen == paths(start.trainable)


# ---- how it is batched -----------------------------------------------------


@every_method
def test_mixed_batch_is_each_task_alone(name):
  s = contract.setup(name)
  if not hasattr(s.model.method, 'num_tasks'):
    pytest.skip('keeps no tasks apart')
  assert s.model.method.num_tasks == 1
  method = s.model.method.clone(num_tasks=TASKS)
  together = dataclasses.replace(s.model, method=method)
  boxed = together.init_method(jax.random.PRNGKey(0), contract.params())
  own = dataclasses.replace(s, model=together).moved
  tasks = np.arange(ROWS) % TASKS
  texts = [
    (*text, task)
    for text, task in zip(contract.examples(0), tasks, strict=True)
  ]
  got = contract.jit(together.logits)(
    s.frozen, own, contract.convert(together, texts)
  )
  single = train_state.flatten(s.start().trainable['method'])
  for task in range(TASKS):
    alone = {}
    for path, box in train_state.flatten(boxed).items():
      x = train_state.flatten(own['method'])[path]
      if 'task' in box.names:
        x = np.take(x, task, box.names.index('task'))
      alone[path] = x.reshape(single[path].shape)
    alone = {**own, 'method': train_state.unflatten(alone)}
    want = s.logits(s.frozen, alone, s.batches[0])
    mine = tasks == task
    np.testing.assert_allclose(got[mine], want[mine], **CLOSE)
    assert np.abs(got[~mine] - want[~mine]).max() > 1e-4


@every_method
def test_packed_is_unpacked(name):
  """Loss and gradient of each example, however many share its row."""
  s = contract.setup(name)
  packed = s.convert(
    contract.examples(0), {'inputs': 24, 'targets': 18}, pack=True
  )
  segments = packed['decoder_segment_ids']
  assert len(segments) < ROWS and segments.max() > 1
  owner = np.full(segments.shape, -1)
  for i, (_, targets) in enumerate(contract.examples(0)):
    for row in range(len(segments)):
      for segment in range(1, segments.max() + 1):
        here = segments[row] == segment
        if packed['decoder_target_tokens'][row][here].tolist() == targets:
          owner[row, here] = i
  assert set(owner.ravel()) >= set(range(ROWS))
  got = s.gradients(s.frozen, s.moved, packed, owner)
  np.testing.assert_allclose(got[0], s.unpacked[0], **CLOSE)
  same_trees(got[1], s.unpacked[1], **CLOSE)


@every_method
def test_padding_changes_nothing(name):
  s = contract.setup(name)
  longer = {'inputs': LENGTHS['inputs'] + 5, 'targets': LENGTHS['targets'] + 3}
  short = s.logits(s.frozen, s.moved, s.batches[0])
  long = s.logits(s.frozen, s.moved, s.convert(contract.examples(0), longer))
  real = s.batches[0]['decoder_target_tokens'] > 0
  long = np.asarray(long)[:, : real.shape[1]]
  np.testing.assert_allclose(long[real], np.asarray(short)[real], **CLOSE)


@every_method
def test_cached_decoding_is_teacher_forcing(name):
  """The logits of each greedy step are those of all targets at once."""
  s = contract.setup(name)

  def greedy(forced, cache, step, *, num_decodes, cache_batch_axis):
    del num_decodes, cache_batch_axis

    def one(carry, position):
      logits, cache = step(carry[0], position, carry[1])
      best = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
      return (best, cache), (best[:, 0], logits)

    start = forced[:, :1], cache
    _, found = jax.lax.scan(one, start, jnp.arange(forced.shape[1]))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)

  batch = helpers.as_jax(s.batches[0])
  predict = contract.jit(
    functools.partial(s.model.predict_batch, decode_fn=greedy)
  )
  decoded, got = predict(s.frozen, s.moved, batch)
  read = np.pad(decoded, ((0, 0), (1, 0)))[:, :-1]
  given = {**s.batches[0], 'decoder_input_tokens': read}
  want = s.logits(s.frozen, s.moved, given)
  np.testing.assert_allclose(got, want, **CLOSE)
  assert len(np.unique(decoded)) > 3  # it does not say one thing only


# ---- how it is computed ----------------------------------------------------


@every_method
def test_scanned_layers_are_the_loop(name):
  s = contract.setup(name)
  model = contract.other(s, scan_layers=False)

  def unrolled(tree):
    flat = helpers.unstack_layers(train_state.flatten(tree))
    return train_state.unflatten(flat)

  _, frozen = model.split(unrolled(contract.params()))
  moved = helpers.NOTHING | unrolled(s.moved)
  loop = dataclasses.replace(s, model=model)
  method = model.init_method(jax.random.PRNGKey(0), contract.params())
  wanted = {**moved, 'method': partitioning.unbox(method)}
  checkpoints.check_shapes(moved, wanted, name)
  np.testing.assert_allclose(
    loop.logits(frozen, moved, s.batches[0]),
    s.logits(s.frozen, s.moved, s.batches[0]),
    **CLOSE,
  )


@every_method
def test_rematerialised_is_not(name):
  s = contract.setup(name)
  model = contract.other(s, remat_policy='full')
  got = dataclasses.replace(s, model=model).unpacked
  np.testing.assert_allclose(got[0], s.unpacked[0], **CLOSE)
  same_trees(got[1], s.unpacked[1], **CLOSE)


@every_method
def test_mesh_of_2x4_is_one_device(name):
  s = contract.setup(name)
  partitioner = partitioning.Partitioner(data=2, model=4)
  run = run_lib.Run(s.model, 'none', LENGTHS, partitioner=partitioner)
  network, frozen = s.model.split(contract.params())
  places = train_state.unflatten(run.network_shardings)
  frozen = jax.device_put(frozen, s.model.split(places)[1])
  state = s.start()
  abstract = run.abstract_state(
    s.optimizer, run_lib.Base(frozen, network, {}, 0)
  )
  state = jax.tree.map(
    lambda x, to: jax.device_put(x, to.sharding), state, abstract
  )
  spread = [
    not x.sharding.is_fully_replicated
    for x in jax.tree.leaves((frozen, state.trainable['network']))
  ]
  assert sum(spread) > 10
  one_device = s.trajectory[1:]
  with partitioner.activate():
    for i, batch in enumerate(s.batches):
      batch = partitioner.put_batch(batch)
      state, metrics = s.step(state, frozen, batch)
      want = one_device[i][1]
      for key in ('loss', 'target_tokens', 'weight_sum'):
        np.testing.assert_allclose(metrics[key], want[key], rtol=1e-5)


@every_method
def test_bfloat16_is_near(name):
  s = contract.setup(name)
  model = contract.other(s, dtype='bfloat16')
  frozen = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), s.frozen)
  batch = s.batches[0]
  sums = contract.jit(model.loss_fn)(frozen, s.moved, batch)[1]
  want = s.unpacked[0].sum()
  assert sums['loss'].dtype == jnp.float32 and np.isfinite(sums['loss'])
  assert abs(sums['loss'] - want) / sums['target_tokens'] < 0.05


# ---- what becomes of it ----------------------------------------------------


@every_method
def test_saved_and_restored_is_never_stopped(name, tmp_path):
  s = contract.setup(name)
  saved, last = s.trajectory[-2][0], s.trajectory[-1][0]
  keeper = checkpoints.Checkpointer(str(tmp_path))
  keeper.save(jax.tree.map(jnp.asarray, saved), {'batches': STEPS - 1})
  keeper.close()
  keeper = checkpoints.Checkpointer(str(tmp_path))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved
  )
  restored, host = keeper.restore(abstract)
  keeper.close()
  assert host['batches'] == STEPS - 1
  going_on, _ = s.step(contract.on_host(restored), s.frozen, s.batches[-1])
  jax.tree.map(np.testing.assert_array_equal, contract.on_host(going_on), last)


@every_method
def test_export_is_what_was_trained(name, tmp_path):
  s = contract.setup(name)
  path = tmp_path / 'trainable.safetensors'
  checkpoints.save_trainable(path, s.moved, {'method': name})
  flat, header = checkpoints.load_trainable(str(path))
  assert header['method'] == name
  loaded = helpers.NOTHING | train_state.unflatten(flat)
  same_trees(loaded, s.moved)
  got = s.logits(s.frozen, loaded, s.batches[0])
  want = s.logits(s.frozen, s.moved, s.batches[0])
  np.testing.assert_array_equal(got, want)


@every_method
def test_combines_with_a_soft_prompt(name):
  s = contract.setup(name)
  parts = {'method': s.model.method, 'more': SoftPrompt(2)}
  parts = {k: m for k, m in parts.items() if m is not None}
  chain = dataclasses.replace(s.model, method=base.Chain(parts))
  alone = s.model.soft_ids.shape[1]
  assert chain.soft_ids.shape == (1, alone + 2)
  both = dataclasses.replace(s, model=chain)
  batch = both.batches[0]
  loss, found = contract.jit(
    jax.value_and_grad(chain.loss_fn, 1, has_aux=True)
  )(both.frozen, both.moved, batch)
  assert np.isfinite(loss[0])
  assert len(paths(found)) == len(paths(s.moved)) + 1
  for path, x in train_state.flatten(found).items():
    assert (x != 0).any(), f'{path} gets no gradient'
  # What a chain lays on the network is what its parts do, combined.
  own = {k.removeprefix('methods_'): v for k, v in both.moved['method'].items()}
  assert own.keys() == parts.keys()
  by_hand: deltas.Deltas = {}
  for part, method in parts.items():
    model = dataclasses.replace(s.model, method=method)
    trainable = {'method': own[part], 'network': both.moved['network']}
    by_hand = deltas.combine(
      by_hand, model.method_deltas(s.frozen, trainable, batch)
    )
  laid = chain.method_deltas(both.frozen, both.moved, batch)
  jax.tree.map(np.testing.assert_array_equal, laid, by_hand)
