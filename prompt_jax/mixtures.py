"""Mixtures of tasks from gin: rates, caps, a temperature, what is held out.

    prompt-jax train ... --gin_file=runs/mixture.gin \
      --gin.MIXTURE_TASKS="('nli', 'glue_sst2')" --gin.HOLDOUT="('nli',)"

registers a `seqio.Mixture` under the run's MIXTURE_OR_TASK_NAME. A task that is
held out gives no example to training and is evaluated like the others; tasks
of the same texts are held out with it.

Not for tasks themselves (`prompt_jax.tasks`), nor for prompted ones (T0, FLAN),
which are in `instructions/`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import numbers
from typing import Any

from absl import logging
import seqio

from prompt_jax import deltas
from prompt_jax import feature_converters

_NLI = (
  'glue_mnli', 'glue_mnli_matched', 'glue_mnli_mismatched', 'glue_qnli',
  'glue_rte', 'glue_wnli', 'glue_ax', 'snli', 'anli_r1', 'anli_r2', 'anli_r3',
  'super_glue_cb', 'super_glue_rte', 'super_glue_axb', 'super_glue_axg',
)  # fmt: skip
_MRQA = (
  'mrqa_squad', 'mrqa_news_qa', 'mrqa_trivia_qa', 'mrqa_search_qa',
  'mrqa_hotpot_qa', 'mrqa_natural_questions', 'mrqa_bio_asq', 'mrqa_drop',
  'mrqa_duo_rc', 'mrqa_race', 'mrqa_relation_extraction', 'mrqa_textbook_qa',
)  # fmt: skip
# Tasks of one kind: who is tested on one of them has trained on none. A task of
# two kinds, as ReCoRD, is held out with either. In the manner of FLAN, arXiv
# 2109.01652, section 2.1.
CLUSTERS: Mapping[str, tuple[str, ...]] = {
  'nli': _NLI,
  'sentiment': ('glue_sst2', 'imdb', 'sst5', 'mr', 'cr', 'mpqa'),
  'paraphrase': ('glue_mrpc', 'glue_qqp', 'glue_stsb'),
  'topic': ('ag_news', 'dbpedia', 'trec', 'trec_fine'),
  'acceptability': ('glue_cola',),
  'subjectivity': ('subj',),
  'word_sense': ('super_glue_wic',),
  'coreference': (
    'super_glue_wsc_train', 'super_glue_wsc_eval', 'super_glue_wsc_true_false',
  ),
  'commonsense': ('super_glue_copa', 'super_glue_record'),
  'reading': (
    'super_glue_boolq', 'super_glue_multirc', 'super_glue_record', 'squad',
    *_MRQA, 'qa_out_of_domain',
  ),
  'data_to_text': ('e2e_nlg', 'web_nlg', 'dart'),
  'summarization': ('xsum', 'cnn_dailymail'),
}  # fmt: skip
# Tasks with the same texts, under other names, labels or splits: what one tests
# on another may train on. The sentences of SST are MR's.
SAME_TEXTS = (
  ('glue_rte', 'super_glue_rte'),
  ('glue_mnli', 'glue_mnli_matched', 'glue_mnli_mismatched'),
  ('glue_ax', 'super_glue_axb'),
  ('glue_mrpc', 'glue_mrpc_from_qqp'),
  ('glue_qqp', 'glue_qqp_from_mrpc'),
  ('glue_sst2', 'sst5', 'mr'),
  ('squad', 'mrqa_squad'),
  ('trec', 'trec_fine'),
  ('super_glue_wsc_train', 'super_glue_wsc_eval',
   'super_glue_wsc_true_false'),
)  # fmt: skip
_TASKLESS = 'taskless_'


class MixtureError(ValueError):
  """A mixture that cannot be made."""


def same_texts(task: str) -> tuple[str, ...]:
  """The tasks with the texts of a task, itself among them."""
  return next((group for group in SAME_TEXTS if task in group), (task,))


def rate(num_examples: float, cap: float | None, temperature: float) -> float:
  """r_m = min(e_m, K)^(1/T): examples-proportional mixing.

  A task is drawn with probability r_m / sum r. T = 1 is proportional to the
  size, T = inf the same for all.

  Args:
    num_examples: e_m.
    cap: K; None: no cap.
    temperature: T, above 0.

  Raises:
    MixtureError: no examples, a cap or temperature not above 0, or no number.

  Source: Raffel et al. 2020, arXiv 1910.10683, section 3.5.2;
  `seqio.mixing_rate_num_examples`.
  """
  for value in (num_examples, temperature, 1 if cap is None else cap):
    if not isinstance(value, numbers.Real):
      raise MixtureError(
        f'Rates, cap and temperature must be numbers, got {value!r}.'
      )
  if not num_examples > 0 or math.isinf(num_examples):
    raise MixtureError(f'A rate must be above 0, got {num_examples!r}.')
  if cap is not None and not cap > 0:
    raise MixtureError(f'The cap must be above 0, got {cap!r}.')
  if not temperature > 0:
    raise MixtureError(f'The temperature must be above 0, got {temperature!r}.')
  size = num_examples if cap is None else min(num_examples, cap)
  return float(size) ** (1.0 / temperature)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """A mixture as a configuration, in place of `user_data.UserData`.

  Attributes:
    tasks: names of tasks, of mixtures (which stand for their tasks) and of
      clusters, `taskless_nli` being the taskless tasks of one.
    rates: e_m of some tasks, in place of their number of rows.
    cap: K, the most that a task counts for; None: no cap.
    temperature: T.
    holdout: tasks or clusters of the mixture that are evaluated only, in all
      their forms: with `glue_rte` also `taskless_glue_rte`, and, of
      `SAME_TEXTS`, `super_glue_rte`.
    clusters: name -> tasks; None: `CLUSTERS`.
    split: that is trained on and counted.
    number_tasks: gives examples the number of their task as `task_ids`, in the
      order of `expand`, for methods that keep tasks apart.
    rows_dir: folder of local rows; None: TFDS's. Without rows there a task of a
      cluster is left out, as is one that a mixture is evaluated on only.
  """

  tasks: Sequence[str] = ()
  rates: Mapping[str, float] | None = None
  cap: int | None = None
  temperature: float = 1.0
  holdout: Sequence[str] = ()
  clusters: Mapping[str, Sequence[str]] | None = None
  split: str = 'train'
  number_tasks: bool = False
  rows_dir: str | None = None
  # A task has its own; there are none of the mixture.
  labels = None
  given = True

  def __post_init__(self):
    for name in ('tasks', 'holdout'):
      if isinstance(getattr(self, name), str):
        raise MixtureError(
          f'{name} must be names, as in ({getattr(self, name)!r},).'
        )

  @property
  def _clusters(self) -> Mapping[str, Sequence[str]]:
    return CLUSTERS if self.clusters is None else self.clusters

  def register(
    self, name: str, vocabulary: seqio.Vocabulary | None = None
  ) -> seqio.Mixture:
    """Registers the mixture in place of its namesake.

    The tasks are registered before: `prompt_jax.tasks.register(vocabulary)`.

    Raises:
      MixtureError: no tasks, none to train on, an unknown name, one twice, a
        rate that is not above 0, or `number_tasks` with tasks held out.
      UserDataError: local rows are wrong.
    """
    del vocabulary  # the tasks have it
    if name in seqio.TaskRegistry.names():
      raise MixtureError(
        f'{name!r} is a task: give the mixture another MIXTURE_OR_TASK_NAME.'
      )
    names = self._with_rows(self.expand())
    held_out = self._held_out(names)
    tasks = [seqio.TaskRegistry.get(task) for task in names]
    trained = [
      t for t in tasks if t.name not in held_out and self.split in t.splits
    ]
    if not trained:
      raise MixtureError(
        f'Nothing is left to train on: of {", ".join(names)} '
        f'{", ".join(held_out) or "none"} are held out, and the others have no '
        f'split {self.split!r}.'
      )
    if self.number_tasks and held_out:
      raise MixtureError(
        f'{held_out[0]!r} is held out, so that nothing is trained for its '
        'number: leave it out of the mixture, or NUMBER_TASKS.'
      )
    rates = self._rates(trained, names)
    parts = []
    for number, task in enumerate(tasks):
      if self.number_tasks:
        logging.info('task_ids %d: %s', number, task.name)
        task = numbered(task, number)
      if task.name in rates:
        parts.append((task, rates[task.name]))
      else:
        parts.append((evaluated_only(task, self.split), 1.0))
    return add(name, parts)

  def expand(self) -> list[str]:
    """The names of the tasks, held-out ones included.

    Raises:
      MixtureError: no tasks, an unknown name, or a task twice.
    """
    if not self.tasks:
      raise MixtureError(
        'The mixture is empty: give it names of tasks, mixtures or clusters, '
        "as in --gin.MIXTURE_TASKS=\"('nli', 'glue_sst2')\"."
      )
    named, through_clusters = [], []
    for name in self.tasks:
      found = self._members(name)
      if name in seqio.TaskRegistry.names() or self._cluster(name) is None:
        named += found
      else:
        through_clusters += found
    both = [*named, *dict.fromkeys(through_clusters)]
    twice = [name for i, name in enumerate(both) if name in both[:i]]
    twice += [x for i, x in enumerate(self.tasks) if x in self.tasks[:i]]
    if twice:
      raise MixtureError(
        f'{twice[0]!r} is twice in {list(self.tasks)}: give it another rate '
        'instead.'
      )
    return both

  def _cluster(self, name: str) -> Sequence[str] | None:
    """Tasks of a cluster that are registered; None if it is none."""
    form = _TASKLESS if name.startswith(_TASKLESS) else ''
    found = self._clusters.get(name.removeprefix(form))
    if found is None:
      return None
    known = seqio.TaskRegistry.names()
    own = () if self.clusters is None else found  # misspelt ones are told
    return [f'{form}{t}' for t in found if f'{form}{t}' in known or t in own]

  def _members(self, name: str) -> list[str]:
    tasks, mixtures = seqio.TaskRegistry.names(), seqio.MixtureRegistry.names()
    if name in tasks:
      return [name]
    if name in mixtures:
      found = seqio.get_subtasks(seqio.MixtureRegistry.get(name))
      return [task.name for task in found]
    cluster = self._cluster(name)
    if cluster is None:
      known = [*tasks, *mixtures, *self._clusters]
      raise MixtureError(
        f'{name!r} is no task, mixture or cluster.'
        f'{deltas.near_misses(name, known)} The clusters: '
        f'{", ".join(self._clusters)}; `prompt-jax tasks` lists the rest.'
      )
    unknown = [t for t in cluster if t not in tasks]
    if unknown:
      raise MixtureError(
        f'{unknown[0]!r} of the cluster {name!r} is no task.'
        f'{deltas.near_misses(unknown[0], list(tasks))}'
      )
    return list(cluster)

  def _held_out(self, names: Sequence[str]) -> list[str]:
    """The tasks of the mixture that are held out, in all their forms."""
    out: dict[str, None] = {}
    for name in self.holdout:
      members = [t.removeprefix(_TASKLESS) for t in self._members(name)]
      bases = {same for task in members for same in same_texts(task)}
      found = [t for t in names if t.removeprefix(_TASKLESS) in bases]
      if not found:
        raise MixtureError(
          f'{name!r} is to be held out, but nothing of it is in the mixture of '
          f'{", ".join(names)}.{deltas.near_misses(name, list(names))}'
        )
      out |= dict.fromkeys(found)
    return list(out)

  def _with_rows(self, names: Sequence[str]) -> list[str]:
    """Makes the tasks read local rows; those that have them."""
    if self.rows_dir is None:
      return list(names)
    from prompt_jax import tasks

    needed = {t for t in self.tasks if t in seqio.TaskRegistry.names()}
    for name in set(self.tasks) & set(seqio.MixtureRegistry.names()):
      found = [seqio.TaskRegistry.get(t) for t in self._members(name)]
      needed |= {t.name for t in found if self.split in t.splits}
    without = tasks.sources.use_rows_of(names, self.rows_dir, needed)
    return [name for name in names if name not in without]

  def _rates(
    self, tasks: Sequence[seqio.Task], names: Sequence[str]
  ) -> dict[str, float]:
    if not isinstance(self.rates, Mapping | None):
      raise MixtureError(
        f'The rates must be by task, as in {{{names[0]!r}: 1000}}, got '
        f'{self.rates!r}.'
      )
    given = dict(self.rates or {})
    unknown = [name for name in given if name not in names]
    if unknown:
      raise MixtureError(
        f'A rate is given for {unknown[0]!r}, which is not in the mixture.'
        f'{deltas.near_misses(unknown[0], list(names))} It has '
        f'{", ".join(names)}.'
      )
    out = {}
    for task in tasks:
      size = given.get(task.name)
      if size is None:
        size = task.num_input_examples(self.split)
      if size is None:
        raise MixtureError(
          f'The size of {task.name!r} is not known: give it in rates, as in '
          f'{{{task.name!r}: 1000}}.'
        )
      try:
        out[task.name] = rate(size, self.cap, self.temperature)
      except MixtureError as error:
        raise MixtureError(f'{task.name!r}: {error}') from None
    return out


def add(name: str, parts: Sequence[tuple[seqio.Task, float]]) -> seqio.Mixture:
  """Registers a mixture of tasks and rates in place of its namesake."""
  seqio.MixtureRegistry.remove(name)
  made = seqio.Mixture(name, list(parts))
  seqio.MixtureRegistry.add_provider(name, made)
  return made


def numbered(task: seqio.Task, number: int) -> seqio.Task:
  """The task with `task_ids` in its examples."""
  vocabulary = task.output_features['targets'].vocabulary
  ids = feature_converters.output_features(vocabulary, task_ids=True)
  key = feature_converters.TASK_IDS
  return task.replace(
    preprocessors=[
      *task.preprocessors, feature_converters.add_task_id(number)
    ],
    output_features={**task.output_features, key: ids[key]},
  )  # fmt: skip


def evaluated_only(task: seqio.Task, split: str = 'train') -> seqio.Task:
  """The task without a split, so that no mixture trains on it."""
  if split not in task.splits:
    return task
  return task.replace(source=_Without(task.source, split))


class _Without(seqio.DataSource):
  """A source that hides one of its splits."""

  def __init__(self, source: Any, split: str):
    self._source = source
    kept = [name for name in source.splits if name != split]
    super().__init__(splits=kept)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """As the source."""
    return self._source.supports_arbitrary_sharding

  @property
  def performs_internal_shuffling(self) -> bool:
    """As the source."""
    return self._source.performs_internal_shuffling

  def list_shards(self, split: str) -> Sequence[str]:
    """As the source."""
    return self._source.list_shards(split)

  def num_input_examples(self, split: str) -> int | None:
    """As the source."""
    return self._source.num_input_examples(split)

  def get_dataset(self, split: str, *args: Any, **kwargs: Any) -> Any:
    """As the source, but for the hidden split.

    Raises:
      ValueError: the split is the hidden one.
    """
    if split not in self.splits:
      raise ValueError(f'The split {split!r} is held out.')
    return self._source.get_dataset(split, *args, **kwargs)
