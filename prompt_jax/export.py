"""`prompt-jax export`: a trained run as what is needed to use it.

Either the deltas that its method lays on the network (`methods/exported.py`),
without what made them, or, merged, the whole network with the deltas folded
into its weights, which needs no method and may be a base.
"""

import pathlib
import re
from typing import Any

from absl import logging
import jax

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax import gin_utils
from prompt_jax import infer
from prompt_jax import models
from prompt_jax import run as run_lib
from prompt_jax.methods import exported


def export(
  run: run_lib.Run,
  trained: infer.Trained,
  output: str | None,
  merge: bool = False,
) -> None:
  """Writes a directory that `prompt-jax eval`, `infer` and `score` take.

  Args:
    run: model and base checkpoint.
    trained: which of the run's parameters.
    output: a new directory.
    merge: fold the deltas into the network's weights and write all of them.

  Raises:
    ValueError: no directory, or one that holds something; the method's deltas
      depend on the inputs, or cannot be folded into weights.
  """
  if output is None:
    raise ValueError('Give --output=DIR, a directory to write.')
  folder = pathlib.Path(output)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f'{output} is not empty; give --output=DIR another name.')
  checkpoints.check_writable(output)
  with run.partitioner.activate():
    base = run.load()
    trainable = trained.load(run, base)
    params = run.model.params(base.frozen, trainable)
    laid = deployed(run.model, base.frozen, trainable)
    more = {}
    if merge:
      network = deltas.merge_into_weights(laid, params)
      found = {'method': {}, 'network': network}
    else:
      ids = run.model.soft_ids - run.model.config.vocab_size
      arrays, header = exported.pack(jax.device_get(laid), ids)
      found = {'method': arrays, 'network': trainable['network']}
      more['exported'] = header
    found = run.partitioner.gather(found)
  run.export(folder / exported.FILE, found, base, 0, {}, **more)
  config = _config(merge, output)
  checkpoints.write_atomically(folder / 'config.gin', config.encode())
  size = (folder / exported.FILE).stat().st_size
  logging.info('%s: %s bytes.', folder, f'{size:,}')


def deployed(
  model: models.EncoderDecoderModel, frozen: Any, trainable: Any
) -> deltas.Deltas:
  """The deltas of a method, of all tasks, for no batch in particular.

  Raises:
    ValueError: they depend on the batch.
  """
  if model.method is None:
    return {}
  context = model.context(model.params(frozen, trainable), exporting=True)
  variables = {
    'params': trainable['method'],
    'constants': frozen.get('constants', {}),
  }
  laid: Any = model.method.apply(variables, context)
  return laid


def _config(merge: bool, output: str) -> str:
  """The run's configuration with what was exported in the method's place."""
  text = gin_utils.config_str()
  new = {'METHOD': '@exported.Exported()', 'OUTPUT': 'None'}
  new['MODEL_DIR'] = repr(output)
  if merge:
    new |= {'METHOD': 'None', 'TRAINABLE_PATTERNS': "('.*',)"}
  for name, value in new.items():
    # A value goes on until the next line that is not indented.
    text, count = re.subn(
      rf'^{name} =.*\n(?: .*\n)*', f'{name} = {value}\n', text, flags=re.M
    )
    assert count == 1, (name, text)
  if merge:
    return text
  head = 'from prompt_jax.methods import exported\n'
  first = 'from __gin__ import dynamic_registration\n'
  path = '\nexported.Exported.directory = %MODEL_DIR\n'
  return text.replace(first, first + head, 1) + path
