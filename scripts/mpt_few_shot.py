"""MPT on a small model: what source tasks share helps with few examples.

    python scripts/mpt_few_shot.py --output=docs/results/mpt

The tasks are about records of six attributes with three values each, in any
order. A model of width 32 is first trained to answer questions about them, such
as 'colour, in words 2, moved by 1': of what attribute, in which of three sets
of words, and by how much values are moved among the words. A family of tasks
asks of one attribute, in ways to answer that differ. Five of the nine ways are
sources with many examples, the other four are targets with few. What they
share, the attribute, is what few examples do not tell. A prompt is tuned for
each source, MPT's source stage distills them into one shared prompt, and a
target adapts it; beside it, prompts are tuned for the targets from nothing.
"""

import argparse
from collections.abc import Sequence
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from matplotlib import figure as figures
import numpy as np
import tabulate

from prompt_jax import checkpoints
from prompt_jax import learning_rates
from prompt_jax import models
from prompt_jax import optimizers
from prompt_jax import partitioning
from prompt_jax import schedules
from prompt_jax import trainer
from prompt_jax.methods import initializers
from prompt_jax.methods.mpt import MPT
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.network.layers import T5Config
from prompt_jax.study import plots

ATTRIBUTES, VALUES = 6, 3
WAYS = VALUES**2  # a set of words, and a move
VALUE = 2  # the first id of a value; then of questions, and of answers
ASK = VALUE + ATTRIBUTES * VALUES
ANSWER = ASK + ATTRIBUTES + 2 * VALUES
CONFIG = T5Config(
  vocab_size=ANSWER + WAYS,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  mlp_dim=64,
  num_encoder_layers=2,
  num_decoder_layers=2,
  relpos_num_buckets=8,
  relpos_max_distance=16,
)
P = 4
ATTRIBUTE = 2
FAMILY = np.random.default_rng(5).permutation(WAYS)
SOURCES, TARGETS = FAMILY[:5], FAMILY[5:]
SCALES = (1.0, 0.3, 0.1, 0.03)
REPEATS = 4  # of each target: other examples and initial values
INIT = initializers.SampledVocab()

# Also in tests, which elsewhere compile without optimizing.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 3}
)


# ---- tasks -----------------------------------------------------------------


def examples(rng, attribute, way, question):
  """A batch; `attribute` and `way` are [n], `question` [n, Q] stands first."""
  n = len(attribute)
  values = rng.integers(0, VALUES, (n, ATTRIBUTES))
  order = rng.permuted(np.tile(np.arange(ATTRIBUTES), (n, 1)), axis=1)
  record = VALUE + VALUES * order + np.take_along_axis(values, order, axis=1)
  value = values[np.arange(n), attribute]
  moved = (value + way % VALUES) % VALUES
  answer = ANSWER + VALUES * (way // VALUES) + moved
  targets = np.stack([answer, np.ones(n, int)], axis=1)
  batch = {
    'encoder_input_tokens': np.concatenate([question, record], axis=1),
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': np.ones_like(targets),
  }
  return {name: x.astype(np.int32) for name, x in batch.items()}


def asked(rng, n):
  """Questions in words about everything, for pretraining."""
  attribute = rng.integers(0, ATTRIBUTES, n)
  way = rng.integers(0, WAYS, n)
  words = attribute, ATTRIBUTES + way // VALUES
  words = *words, ATTRIBUTES + VALUES + way % VALUES
  return examples(rng, attribute, way, ASK + np.stack(words, axis=1))


def of_task(rng, way, n, soft):
  """Examples of one task behind its soft tokens."""
  both = np.full(n, ATTRIBUTE), np.full(n, way)
  return examples(rng, *both, np.tile(soft, (n, 1)))


def joined(batches, join=np.concatenate):
  """The arrays of batches as one batch."""
  return {name: join([b[name] for b in batches]) for name in batches[0]}


# ---- training --------------------------------------------------------------


def rows(rng, n, steps, size):
  """Which examples each step takes: permutations, one after another."""
  taken = [rng.permutation(n) for _ in range(-(-steps * size // n))]
  return np.concatenate(taken)[: steps * size].reshape(steps, size)


def many_steps(model, optimizer, rate):
  """A function of (state, frozen, data, rows, scale of the rate)."""

  def go(state, frozen, data, rows, scale=1.0):
    def step(state, frozen, batch):
      return trainer.train_step(
        state, frozen, batch, scale,
        model=model, optimizer=optimizer, learning_rate_fn=rate,
      )  # fmt: skip

    count = np.int32(rows.shape[-2])
    return trainer.train_steps(state, frozen, data, rows, count, step_fn=step)

  return go


def start(model, optimizer, params, seed=0):
  """The state before the first step."""
  key = jax.random.PRNGKey(seed)
  return trainer.init_state(key, params, model=model, optimizer=optimizer)


def adafactor():
  """As the papers use it: a constant scale, hardly any decay."""
  return optimizers.adafactor(
    multiply_by_parameter_scale=False, weight_decay_rate=1e-5
  )


def decaying(base, steps):
  """A rate that falls to 0 along a cosine."""
  return schedules.create_learning_rate_scheduler(
    'constant * cosine_decay', base, steps_per_cycle=steps
  )


def by_part(prompt, factors):
  """MPT's two rates: of the prompt, and of the factors."""
  return learning_rates.by_part({
    'method/prompt': learning_rates.Part(adafactor(), prompt),
    'method/[uv]': learning_rates.Part(adafactor(), factors),
  })  # fmt: skip


def accuracy(model, frozen, trainable, batch):
  """Of the answers; what follows them is always the same."""
  best = jnp.argmax(model.logits(frozen, trainable, batch)[:, 0], axis=-1)
  return jnp.mean(best == batch['decoder_target_tokens'][:, 0])


def pretrained(steps=350):
  """The base, and how often it is right at the end."""
  model = models.EncoderDecoderModel(CONFIG, trainable_patterns=('.*',))
  params = partitioning.unbox(model.init_network(jax.random.PRNGKey(0)))
  optimizer = learning_rates.scaled(
    optimizers.adamw(b2=0.98, global_norm_clip_threshold=1.0),
    {'network/token_embedder/embedding': 20.0},
  )
  rate = schedules.create_learning_rate_scheduler(
    'constant * linear_warmup * cosine_decay',
    3e-3,
    warmup_steps=50,
    steps_per_cycle=steps,
  )
  rng = np.random.default_rng(0)
  taken = rows(rng, steps * 128, steps, 128)
  state, metrics = jit(many_steps(model, optimizer, rate))(
    start(model, optimizer, params), {}, asked(rng, steps * 128), taken
  )
  right = metrics['correct_tokens'][-10:] / metrics['target_tokens'][-10:]
  return jax.device_get(state.trainable['network']), float(right.mean())


def on_sources(model, optimizer, rate, frozen, params, steps):
  """The state after training on all source tasks, and accuracies of each."""
  rng = np.random.default_rng(1)
  soft = model.soft_ids
  tasks = list(enumerate(SOURCES))
  data = joined([of_task(rng, way, 512, soft[g]) for g, way in tasks])
  taken = rows(rng, len(SOURCES) * 512, steps, 64)
  state, _ = jit(many_steps(model, optimizer, rate))(
    start(model, optimizer, params), frozen, data, taken
  )
  test = joined([of_task(rng, way, 300, soft[g]) for g, way in tasks], np.stack)
  each = jit(jax.vmap(lambda b: accuracy(model, frozen, state.trainable, b)))
  return jax.device_get(state.trainable), np.asarray(each(test))


def on_targets(method, optimizer, rate, params, shots, steps=100):
  """Mean accuracy before and after few-shot training.

  Of `SCALES` of the learning rates that which is best on other examples.
  """
  model = models.EncoderDecoderModel(CONFIG, method=method)
  runs = [(way, seed) for way in TARGETS for seed in range(REPEATS)]
  soft = model.soft_ids[0]
  rngs = [np.random.default_rng([7, way, seed]) for way, seed in runs]
  ways = [way for way, _ in runs]

  def drawn(n):
    pairs = zip(rngs, ways, strict=True)
    return joined([of_task(r, way, n, soft) for r, way in pairs], np.stack)

  data, validation, test = drawn(shots), drawn(200), drawn(200)
  taken = np.stack([rows(r, shots, steps, min(shots, 32)) for r in rngs])
  states = [start(model, optimizer, params, seed) for _, seed in runs]
  states = jax.tree.map(lambda *x: jnp.stack(x), *states)
  go = many_steps(model, optimizer, rate)

  def one(run, scale):
    state, data, validation, test, taken = run
    before = accuracy(model, params, state.trainable, test)
    state, _ = go(state, params, data, taken, scale)
    trained = state.trainable
    found = (accuracy(model, params, trained, x) for x in (validation, test))
    return *found, before

  # Mapped: on a CPU faster than batched.
  every = jit(lambda runs, scale: jax.lax.map(lambda r: one(r, scale), runs))
  each = states, data, validation, test, taken
  found = [
    tuple(float(x.mean()) for x in every(each, scale)) for scale in SCALES
  ]
  print('Validation, test, before:', np.round(found, 3).tolist(), flush=True)
  _, after, before = max(found)
  return before, after


# ---- the experiment --------------------------------------------------------


class Experiment:
  """The base, prompts of the sources, and the shared prompt they give."""

  def __init__(self, folder: pathlib.Path):
    self.params, self.base = pretrained()
    # A teacher for each source task.
    plain = models.EncoderDecoderModel(
      CONFIG, method=SoftPrompt(P, len(SOURCES), INIT)
    )
    taught, self.teachers = on_sources(
      plain, adafactor(), decaying(0.1, 250), self.params, self.params, 250
    )
    np.save(folder / 'teachers.npy', taught['method']['prompt'])
    # The source stage.
    files = (str(folder / 'teachers.npy'),)
    method = MPT(P, len(SOURCES), prompt_init=INIT, teachers=files)
    model = models.EncoderDecoderModel(CONFIG, method=method)
    frozen = {**self.params, 'constants': model.constants(self.params)}
    rate = decaying(0.1, 300)
    shared, self.sources = on_sources(
      model, by_part(rate, rate), rate, frozen, self.params, 300
    )
    self.path = folder / 'trainable.safetensors'
    checkpoints.save_trainable(self.path, shared, {})

  def few_shot(self, shots: int) -> dict[str, float]:
    """Mean accuracy on the targets, in per cent."""
    constant = schedules.constant(0.3)
    factors = schedules.constant(0.4)
    before, adapted = on_targets(
      MPT(P, source=str(self.path)), by_part(constant, factors), constant,
      self.params, shots,
    )  # fmt: skip
    method = SoftPrompt(P, prompt_init=INIT)
    _, scratch = on_targets(method, adafactor(), constant, self.params, shots)
    return {
      'MPT': 100 * adapted,
      'MPT, its shared prompt alone': 100 * before,
      'Prompt tuning': 100 * scratch,
    }


def write(
  experiment: Experiment,
  found: dict[int, dict[str, float]],
  output: pathlib.Path,
) -> None:
  """The table and the picture."""
  output.mkdir(parents=True, exist_ok=True)
  names = list(next(iter(found.values())))
  table = tabulate.tabulate(
    [[name, *(found[n][name] for n in found)] for name in names],
    ['accuracy after examples', *map(str, found)],
    tablefmt='github', floatfmt='.1f',
  )  # fmt: skip
  before = (
    f'The base answers {100 * experiment.base:.1f} % of its questions; the '
    f'prompts of the sources {100 * experiment.teachers.mean():.1f} %, the '
    f'shared one with their factors {100 * experiment.sources.mean():.1f} %.'
  )
  chance = 100 / (3 * VALUES)
  end = (
    f'Accuracy in per cent, mean over {len(TARGETS)} targets and {REPEATS} '
    f'seeds each; an answer drawn of all nine is right in {chance:.1f}. The '
    f'best of {len(SCALES)} learning rates is chosen on other examples.'
  )
  text = (__doc__ or '').split('\n\n')[2]
  lines = ['# MPT on a small model', '', text, '', before, '', table, '', end]
  (output / 'README.md').write_text('\n'.join(lines) + '\n')
  figure = figures.Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  for name in names:
    axes.plot(
      list(found), [found[n][name] for n in found], marker='o', label=name
    )
  axes.axhline(chance, color='grey', linestyle=':', label='drawn answers')
  axes.set(
    xscale='log', xlabel='examples of a target', ylabel='accuracy, per cent',
    title='MPT and prompt tuning, model of width 32',
  )  # fmt: skip
  axes.set_xticks(list(found), [str(n) for n in found])
  axes.minorticks_off()
  axes.legend(frameon=False)
  plots.save(figure, [output / 'accuracy.png'])


def main() -> None:
  """Trains, writes and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', default='docs/results/mpt')
  parser.add_argument('--shots', default='4,8,16,32,64')
  args = parser.parse_args()
  shots: Sequence[int] = [int(n) for n in args.shots.split(',')]
  output = pathlib.Path(args.output)
  with tempfile.TemporaryDirectory() as folder:
    experiment = Experiment(pathlib.Path(folder))
    found = {n: experiment.few_shot(n) for n in shots}
  write(experiment, found, output)
  print((output / 'README.md').read_text())


if __name__ == '__main__':
  main()
