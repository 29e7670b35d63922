"""MPT: shared prompt and factors, distillation, and from stage to stage."""

import dataclasses
import functools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import checkpoints
from prompt_jax import export
from prompt_jax import gin_utils
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax.methods import base
from prompt_jax.methods.mpt import MPT
from prompt_jax.methods.soft_prompt import SoftPrompt

CONFIG = helpers.SMALL
V, D, P, G = CONFIG.vocab_size, CONFIG.emb_dim, 3, 2
TASKS = np.array([1, 0, 0, 1], np.int32)
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def prompts(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(**fields):
  method = MPT(**{'length': P, **fields})
  return models.EncoderDecoderModel(CONFIG, method=method)


@pytest.fixture(scope='module')
def network():
  init = jax.jit(models.EncoderDecoderModel(CONFIG).init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def started(of, network):
  made = of.init_method(jax.random.PRNGKey(0), network)
  return {'method': partitioning.unbox(made), 'network': {}}


def random_own(num_tasks=1, rank=1):
  group = (num_tasks,) if num_tasks > 1 else ()
  return {
    'prompt': prompts(P, D),
    'u': prompts(*group, P, rank, seed=1),
    'v': prompts(*group, rank, D, seed=2),
  }


def rows(of, network, own, **batch):
  laid = of.method_deltas(network, {'method': own, 'network': {}}, {
    'encoder_input_tokens': np.ones((1, 4), np.int32), **batch
  })  # fmt: skip
  [(path, delta)] = laid.items()
  assert path == 'token_embedder/rows' and delta.group is None
  return np.asarray(delta.table)


def mixed_batch(of):
  """Examples of two tasks, with their soft tokens in front."""
  text = helpers.random_batch(CONFIG)
  soft = of.soft_ids[TASKS]
  tokens = np.concatenate([soft, text['encoder_input_tokens']], axis=1)
  return {**text, 'encoder_input_tokens': tokens, 'task_ids': TASKS}


# ---- the equation ----------------------------------------------------------


@pytest.mark.parametrize(('num_tasks', 'rank'), [(1, 1), (3, 1), (3, 2)])
def test_prompts_are_the_shared_one_scaled(network, num_tasks, rank):
  of, own = model(num_tasks=num_tasks, rank=rank), random_own(num_tasks, rank)
  got = rows(of, network, own)
  assert got.shape == (1, num_tasks * P, D)
  got = got.reshape(num_tasks, P, D)
  u, v = own['u'].reshape(-1, P, rank), own['v'].reshape(-1, rank, D)
  for task in range(num_tasks):
    for j in range(P):
      scale = sum(u[task, j, r] * v[task, r] for r in range(rank))
      np.testing.assert_allclose(
        got[task, j], own['prompt'][j] * scale, **CLOSE
      )


@pytest.mark.parametrize('rank', [1, 3])
def test_starts_at_the_shared_prompt(network, rank):
  """Bit for bit, for every task."""
  of = model(num_tasks=G, rank=rank)
  own = started(of, network)['method']
  got = rows(of, network, own).reshape(G, P, D)
  np.testing.assert_array_equal(got, np.stack([own['prompt']] * G))
  embedding = np.asarray(of.embedding(network))
  for row in own['prompt']:
    assert (row == embedding).all(-1).any()
  # Ranks can part: a gradient reaches each, but they are not alike.
  assert len(np.unique(own['u'], axis=-1)[0, 0]) == rank


@pytest.mark.parametrize('factor', [2.0, -0.7])
def test_only_the_product_of_the_factors_counts(network, factor):
  of, own = model(), random_own()
  batch = helpers.with_prompt(helpers.random_batch(CONFIG), of)
  logits = jax.jit(of.logits)
  want = logits(network, {'method': own, 'network': {}}, batch)
  scaled = {**own, 'u': own['u'] * factor, 'v': own['v'] / factor}
  got = logits(network, {'method': scaled, 'network': {}}, batch)
  atol = 1e-6 * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_exported_it_is_a_soft_prompt(network):
  of, own = model(num_tasks=G), random_own(G)
  trainable = {'method': own, 'network': {}}
  [(_, laid)] = export.deployed(of, network, trainable).items()
  plain = dataclasses.replace(of, method=SoftPrompt(P, num_tasks=G))
  np.testing.assert_array_equal(plain.soft_ids, of.soft_ids)
  batch = mixed_batch(of)
  want = jax.jit(of.logits)(network, trainable, batch)
  got = jax.jit(plain.logits)(
    network, helpers.prompted(laid.table.reshape(G, P, D)), batch
  )
  atol = 1e-6 * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize(('num_tasks', 'count'), [(1, 77_668), (6, 82_008)])
def test_counts_of_t5_base(num_tasks, count):
  context = base.Context(
    embedding=jax.ShapeDtypeStruct((5000, 768), jnp.float32),
    config=dataclasses.replace(CONFIG, emb_dim=768),
    modules=('token_embedder',),
  )
  method = MPT(num_tasks=num_tasks)
  made = jax.eval_shape(method.init, jax.random.PRNGKey(0), context)
  assert sum(x.size for x in jax.tree.leaves(made)) == count


# ---- distillation ----------------------------------------------------------


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
  """A function: a model with random teachers, by its other fields."""
  folder = tmp_path_factory.mktemp('teachers')
  teachers = prompts(G, P, D, seed=5)
  for i, teacher in enumerate(teachers):
    np.save(folder / f'{i}.npy', teacher)
  np.save(folder / 'all.npy', teachers)

  def make(files=('0.npy', '1.npy'), config=CONFIG, **fields):
    paths = tuple(str(folder / name) for name in files)
    method = MPT(P, G, teachers=paths, **fields)
    return models.EncoderDecoderModel(config, method=method)

  return make


def distilled(of, network, own, batch):
  """The loss that distillation adds, of an untraced model."""
  frozen = {**network, 'constants': of.constants(network)}
  trainable = {'method': own, 'network': {}}

  @jax.jit
  def added(trainable):
    params, found, _ = of.lay(frozen, trainable, batch)
    outputs = of.apply(params, found, batch, mutable=['intermediates'])
    hook = of.method.auxiliary_loss
    return hook(of, frozen, params, found, batch, outputs), outputs

  return added(trainable)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(
  'fields', [{}, {'temperature': 2.0, 'distillation': 0.3}]
)
def test_loss_is_its_equation(network, taught, fields):
  of, own = taught(**fields), random_own(G)
  batch = mixed_batch(of)
  got, (logits, seen) = distilled(of, network, own, batch)
  # The teacher: a soft prompt of each task, each example alone.
  weight, tau = fields.get('distillation', 0.9), fields.get('temperature', 1.0)
  plain = models.EncoderDecoderModel(CONFIG, method=SoftPrompt(P, G))
  laid = plain.lay(network, helpers.prompted(prompts(G, P, D, seed=5)), batch)
  wanted, other = jax.jit(
    lambda: plain.apply(*laid[:2], batch, mutable=['intermediates'])
  )()
  real = batch['decoder_target_tokens'] > 0
  p, q = log_softmax(wanted / tau), log_softmax(logits / tau)
  divergence = tau**2 * (np.exp(p) * (p - q)).sum(-1)[real].mean()
  distance = 0.0
  for stack, places in (
    ('encoder', batch['encoder_input_tokens'] > 0),
    ('decoder', real),
  ):
    x, y = (
      s['intermediates'][stack]['layers']['hidden'] for s in (seen, other)
    )
    assert x.shape[0] == 2  # layers; the last counts
    squares = np.square(np.asarray(x[-1] - y[-1], np.float64))
    distance += squares[places].mean()
  assert divergence > 0.01 and distance > 0.01
  want = weight * (divergence + distance)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_nothing_to_learn(network, taught):
  of = taught()
  # One task's teacher for all: a shared prompt and ones.
  path = of.method.teachers[0]
  of = dataclasses.replace(of, method=of.method.clone(teachers=(path, path)))
  own = {
    'prompt': np.load(path),
    'u': np.ones((G, P, 1), np.float32),
    'v': np.ones((G, 1, D), np.float32),
  }
  got, _ = distilled(of, network, own, mixed_batch(of))
  assert 0 <= got < 1e-10
  own['u'][1] *= 1.5
  assert distilled(of, network, own, mixed_batch(of))[0] > 1e-3


def test_padding_changes_nothing(network, taught):
  of, own = taught(), random_own(G)
  batch = mixed_batch(of)
  longer = {
    name: x if name == 'task_ids' else np.pad(x, ((0, 2), (0, 3)))
    for name, x in batch.items()
  }
  longer['task_ids'] = np.pad(TASKS, (0, 2))
  np.testing.assert_allclose(
    distilled(of, network, own, batch)[0],
    distilled(of, network, own, longer)[0],
    rtol=1e-5,
  )


def test_layers_may_be_a_loop(network, taught):
  own = random_own(G)
  of = taught()
  loop = taught(config=dataclasses.replace(CONFIG, scan_layers=False))
  flat = helpers.train_state.flatten(network)
  unrolled = helpers.train_state.unflatten(helpers.unstack_layers(flat))
  np.testing.assert_allclose(
    distilled(of, network, own, mixed_batch(of))[0],
    distilled(loop, unrolled, own, mixed_batch(of))[0],
    rtol=1e-5,
  )


def test_one_file_of_all_teachers_is_a_file_for_each(network, taught):
  every = taught(('all.npy',)).constants(network)['teachers']
  assert every.shape == (G, P, D) and every.dtype == jnp.float32
  np.testing.assert_array_equal(every, taught().constants(network)['teachers'])
  message = r'shape \(4, 3, 16\), expected \(2, 3, 16\)'
  with pytest.raises(ValueError, match=message):
    taught(('all.npy', 'all.npy')).constants(network)
  with pytest.raises(checkpoints.CheckpointError, match='none.npy'):
    taught(('none.npy', '0.npy')).constants(network)


@pytest.mark.slow
def test_training_loss_has_it_on_top(network, taught):
  """At the task loss's scale: sums over tokens, or divided by a factor."""
  of, own = taught(), random_own(G)
  batch = helpers.as_jax(mixed_batch(of))
  frozen = {**network, 'constants': of.constants(network)}
  alone = models.EncoderDecoderModel(CONFIG, method=MPT(P, G))
  trainable = {'method': own, 'network': {}}

  def losses(of, frozen, factor=None):
    return of.loss_fn(frozen, trainable, batch, None, factor)

  added = distilled(of, network, own, batch)[0]
  for factor in (None, 24.0):
    with_it, sums = jax.jit(lambda f=factor: losses(of, frozen, f))()
    without, plain = jax.jit(lambda f=factor: losses(alone, network, f))()
    tokens = np.sum(batch['decoder_loss_weights'])
    want = added * tokens / (1.0 if factor is None else factor)
    np.testing.assert_allclose(with_it - without, want, rtol=1e-4)
    np.testing.assert_allclose(sums['loss'], plain['loss'], rtol=1e-6)


@pytest.mark.slow
def test_only_the_student_is_taught(network, taught):
  """A gradient flows to every parameter, none to the teachers."""
  of, own = taught(), random_own(G)
  batch = helpers.as_jax(mixed_batch(of))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def slopes(own, teachers):
    frozen = {**network, 'constants': {'teachers': teachers}}
    trainable = {'method': own, 'network': {}}
    params, found, _ = of.lay(frozen, trainable, batch)
    outputs = of.apply(params, found, batch, mutable=['intermediates'])
    hook = of.method.auxiliary_loss
    return hook(of, frozen, params, found, batch, outputs)

  student, teachers = slopes(own, of.constants(network)['teachers'])
  assert (np.asarray(teachers) == 0).all()
  for name, grad in student.items():
    assert np.isfinite(grad).all() and (np.asarray(grad) != 0).any(), name


def test_without_teachers_there_is_no_distillation():
  assert MPT(P, G).auxiliary_loss is None
  assert MPT(P, G, teachers=('a', 'b')).auxiliary_loss is not None


# ---- from stage to stage ---------------------------------------------------


@pytest.fixture
def source(tmp_path):
  """The file of a source stage of three tasks, and its arrays."""
  own = random_own(3, 2)
  path = tmp_path / 'trainable.safetensors'
  checkpoints.save_trainable(path, {'method': own, 'network': {}}, {})
  return str(path), own


@pytest.mark.parametrize('num_tasks', [1, 2])
def test_targets_start_at_the_mean_of_the_factors(network, source, num_tasks):
  path, own = source
  of = model(num_tasks=num_tasks, rank=2, source=path)
  # As a run makes its state: traced.
  made = jax.jit(of.init_method)(jax.random.PRNGKey(0), network)
  made = partitioning.unbox(made)
  np.testing.assert_array_equal(made['prompt'], own['prompt'])
  for name in 'uv':
    mean = own[name].mean(axis=0)
    want = mean if num_tasks == 1 else np.stack([mean] * num_tasks)
    np.testing.assert_allclose(made[name], want, rtol=1e-6)
    assert made[name].dtype == jnp.float32


def test_a_target_may_be_a_source(network, tmp_path):
  own = random_own()
  path = tmp_path / 'trainable.safetensors'
  checkpoints.save_trainable(path, {'method': own, 'network': {}}, {})
  made = started(model(source=str(path)), network)['method']
  jax.tree.map(np.testing.assert_array_equal, made, own)


def test_another_source_is_refused(network, source, tmp_path):
  path, _ = source
  with pytest.raises(ValueError, match=r'u has shape \(3, 2\) .* \(3, 1\)'):
    started(model(source=path), network)
  with pytest.raises(ValueError, match=r'prompt has shape \(3, 16\) .*\(4, 16'):
    started(model(source=path, rank=2, length=4), network)
  with pytest.raises(checkpoints.CheckpointError, match="No file 'nowhere'"):
    started(model(source='nowhere'), network)
  other = tmp_path / 'soft_prompt.safetensors'
  checkpoints.save_trainable(other, helpers.prompted(prompts(P, D)), {})
  with pytest.raises(ValueError, match="no array 'method/u', so it is no MPT"):
    started(model(source=str(other)), network)


def test_two_learning_rates(network):
  """The first step of Adafactor is the learning rate, in every coordinate."""
  flags = [
    f'{name}=none'
    for name in ('VOCABULARY', 'VOCABULARY_PATH', 'MIXTURE_OR_TASK_NAME')
  ]
  gin_utils.parse(
    ['models/tiny.gin', 'methods/mpt.gin', 'runs/train.gin'],
    [*flags, 'TRAIN_STEPS=1'],
  )
  optimizer = gin_utils.build('%OPTIMIZER')
  gin_utils.clear()
  own = {'method': random_own(), 'network': {}}
  grads = jax.tree.map(lambda x: prompts(*x.shape, seed=9), own)
  updates, _ = optimizer.update(
    grads, optimizer.init(own), own, learning_rate=7.0, learning_rate_scale=1.0,
    step=0,
  )  # fmt: skip
  for name, rate in {'prompt': 0.3, 'u': 0.4, 'v': 0.4}.items():
    step = updates['method'][name] + 1e-5 * own['method'][name]
    np.testing.assert_allclose(np.abs(step), rate, rtol=1e-4)


# ---- what is refused -------------------------------------------------------


@pytest.mark.parametrize('field', ['length', 'num_tasks', 'rank'])
@pytest.mark.parametrize('value', [0, -3, 2.0, '5', None])
def test_sizes_are_whole_numbers(field, value):
  message = f'MPT.{field} must be .* at least 1, got {value!r}'
  with pytest.raises(ValueError, match=message):
    MPT(**{field: value})


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'distillation': -0.1}, 'distillation must be a number of at least 0'),
    ({'distillation': '1'}, 'distillation must be a number of at least 0'),
    ({'temperature': 0.0}, 'temperature must be a number above 0, got 0.0'),
    ({'temperature': math.inf}, 'temperature must be a number above 0'),
    ({'teachers': 'a.npy'}, "must be a list of files, got 'a.npy'"),
  ],
)
def test_bad_settings(fields, message):
  with pytest.raises(ValueError, match=message):
    MPT(**{'num_tasks': 3, **fields})


def test_too_large_a_rank(network):
  with pytest.raises(ValueError, match=r'rank is 4, .* \[3, 16\] .* most 3'):
    started(model(rank=4), network)


def test_teachers_in_a_chain_are_refused(network, taught):
  chain = base.Chain({'mpt': taught().method, 'more': SoftPrompt(2)})
  of = models.EncoderDecoderModel(CONFIG, method=chain)
  with pytest.raises(ValueError, match='teachers cannot stand in a Chain'):
    started(of, network)
