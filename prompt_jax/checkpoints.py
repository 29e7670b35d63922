"""Saving and restoring a run: the train state, and where its data stand.

What is saved is kilobytes: step, trainable parameters, optimizer state, RNG,
position of the data, and the fingerprint of the frozen base, never the base
itself.  Orbax writes asynchronously into a temporary directory and renames it,
so that a kill at any moment leaves the last whole checkpoint.  Reading a base
(T5X, Hugging Face) is the job of `convert/`.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import tempfile
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from prompt_jax import fingerprints
from prompt_jax import train_state
from prompt_jax.train_state import TrainState


class CheckpointError(ValueError):
  """A checkpoint that cannot be restored here, or a place that takes none."""


def check_writable(directory: str | None) -> None:
  """Fails before any work is done, not at the first save.

  Raises:
    CheckpointError: no directory, or it cannot be made or written.
  """
  if directory is None:
    raise CheckpointError(
      'A run needs a directory to write into: --model_dir=...'
    )
  path = pathlib.Path(directory)
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path) as f:
      f.write(b'0' * 4096)
      f.flush()
      os.fsync(f.fileno())
  except OSError as e:
    raise CheckpointError(
      f'MODEL_DIR {directory!r} cannot be written: {e.strerror or e}. '
      'Choose another directory or free some space.'
    ) from e


class Checkpointer:
  """Checkpoints of one run, in `MODEL_DIR/checkpoints/<step>`."""

  def __init__(
    self,
    model_dir: str,
    keep: int | None = 3,
    base: fingerprints.Fingerprint | None = None,
    vocabulary: str | None = None,
    read_only: bool = False,
  ):
    """Opens the directory.

    Args:
      model_dir: of the run.
      keep: how many of the newest checkpoints stay; None for all.
      base: fingerprint of the frozen base; None skips the comparison.
      vocabulary: fingerprint of the vocabulary; the same.
      read_only: changes nothing, so that the run may be going on.
    """
    self.directory = pathlib.Path(model_dir).absolute() / 'checkpoints'
    self.base, self.vocabulary = base, vocabulary
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=not read_only,
        # What a killed process left half written.
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
      ),
      # Named here, so that a new process can read what another one saved.
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'host': ocp.JsonCheckpointHandler(),
      },
    )

  def latest_step(self) -> int | None:
    """The newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, host: Mapping[str, Any]) -> None:
    """Starts to save; returns when the arrays have been copied.

    Args:
      state: on the devices.
      host: what the loop needs to go on, as JSON.

    Raises:
      CheckpointError: the disk is full or the directory is gone.
    """
    step = int(state.step)
    host = {**host, 'base': self.base, 'vocabulary': self.vocabulary}
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_as_dict(state)),
          host=ocp.args.JsonSave(host),
        ),
      )
    except Exception as e:  # orbax wraps what the disk said in several types
      raise self._failed(step, e) from e

  def wait(self) -> None:
    """Returns when what has been saved is on the disk.

    Raises:
      CheckpointError: the background save failed; the last whole checkpoint
        is untouched.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as e:
      raise self._failed(None, e) from e

  def _failed(self, step: int | None, e: Exception) -> CheckpointError:
    return CheckpointError(
      f'Saving {"a checkpoint" if step is None else f"step {step}"} to '
      f'{self.directory} failed: {e}. The last whole checkpoint (step '
      f'{self._manager.latest_step()}) is untouched; free some space and '
      'start the same command again to go on from it.'
    )

  def host_state(self, step: int | None = None) -> dict[str, Any]:
    """What the loop saved beside the state."""
    step = self.latest_step() if step is None else step
    restored = self._manager.restore(
      step, args=ocp.args.Composite(host=ocp.args.JsonRestore())
    )
    return restored['host']

  def restore(
    self, abstract: TrainState, step: int | None = None
  ) -> tuple[TrainState, dict[str, Any]]:
    """The state at a step (the newest by default), and the host's.

    Args:
      abstract: shapes, dtypes and shardings of what is wanted, which need not
        be those of the mesh that saved.
      step: which.

    Raises:
      CheckpointError: no such step, or trainable parameters of other names or
        shapes (all are listed).
      fingerprints.BaseMismatch: it was made on another frozen base.
    """
    step, host = self._check(abstract.trainable, step)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_as_dict(abstract))
      ),
    )
    logging.info('Restored step %d from %s.', step, self.directory)
    return TrainState(**restored['state']), host

  def restore_trainable(self, abstract: Any, step: int | None = None) -> Any:
    """The trainable parameters of a step, without the rest of the state.

    Raises:
      CheckpointError: as `restore`.
      fingerprints.BaseMismatch: as `restore`.
    """
    step, _ = self._check(abstract, step)
    path = self.directory / str(step) / 'state'
    with ocp.PyTreeCheckpointer() as reader:
      restored = reader.restore(
        path,
        args=ocp.args.PyTreeRestore(
          item={'trainable': abstract},
          restore_args=ocp.checkpoint_utils.construct_restore_args(
            {'trainable': abstract}
          ),
          partial_restore=True,
        ),
      )
    return restored['trainable']

  def _check(
    self, abstract: Any, step: int | None
  ) -> tuple[int, dict[str, Any]]:
    """The step that is meant, and its host state, if it can be restored."""
    steps = self._manager.all_steps()
    step = self.latest_step() if step is None else step
    if step is None or step not in steps:
      raise CheckpointError(
        f'No checkpoint of step {step} in {self.directory}; there are '
        f'{sorted(steps) or "none"}.'
      )
    host = self.host_state(step)
    where = f'The checkpoint {self.directory / str(step)}'
    check_origin(host, where, self.base, self.vocabulary)
    saved = self._manager.item_metadata(step)['state']
    saved = getattr(saved, 'tree', saved)
    check_shapes(saved['trainable'], abstract, where)
    return step, host

  def close(self) -> None:
    """Waits for what is being written."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    try:
      self.close()
    except CheckpointError as e:
      if kind is None:
        raise
      logging.warning('%s', e)  # what stopped the run comes first


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {
    'step': state.step,
    'trainable': state.trainable,
    'opt_state': state.opt_state,
    'rng': state.rng,
  }


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(x.shape)
    for path, x in leaves
    if getattr(x, 'shape', None) is not None
  }


def check_shapes(saved: Any, wanted: Any, where: str) -> None:
  """Compares trees of arrays (or of anything with a shape).

  Raises:
    CheckpointError: missing, extra or misshapen arrays; all are listed.
  """
  have, want = _shapes(saved), _shapes(wanted)
  problems = [f'  {n}: missing' for n in sorted(want.keys() - have.keys())]
  problems += [f'  {n}: extra' for n in sorted(have.keys() - want.keys())]
  problems += [
    f'  {n}: shape {have[n]}, expected {want[n]}'
    for n in sorted(want.keys() & have.keys())
    if have[n] != want[n]
  ]
  if problems:
    raise CheckpointError(
      f'{where} holds other trainable parameters than this run:\n'
      + '\n'.join(problems)
      + '\nUse the method file and flags of that run, or a new MODEL_DIR.'
    )


# ---- the trained part alone ------------------------------------------------


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Replaces a file in one step, so that no reader sees half of it."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    temporary.replace(path)
  except OSError as e:
    temporary.unlink(missing_ok=True)
    raise CheckpointError(
      f'{path} could not be written: {e.strerror or e}.'
    ) from e


def save_trainable(
  path: pathlib.Path, trainable: Any, header: Mapping[str, Any]
) -> None:
  """Writes the trained parameters as safetensors, with a header of strings.

  Args:
    path: the file.
    trainable: {'method': ..., 'network': ...}, on hosts or devices.
    header: method, fingerprints, step, metrics; values become JSON.
  """
  from safetensors import numpy as safetensors_numpy

  flat = {
    name: np.ascontiguousarray(x)
    for name, x in train_state.flatten(trainable).items()
  }
  texts = {
    k: v if isinstance(v, str) else json.dumps(v) for k, v in header.items()
  }
  data = safetensors_numpy.save(flat, metadata=texts)
  write_atomically(path, _with_sorted_header(data))


def _with_sorted_header(data: bytes) -> bytes:
  """A safetensors file whose bytes are the same whenever it is written.

  The library writes the metadata in an order of chance.
  """
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:end])
  header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # the arrays stay aligned
  return len(text).to_bytes(8, 'little') + text + data[end:]


def load_trainable(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Arrays by name, and the header, of a `trainable.safetensors`.

  Raises:
    CheckpointError: no such file, or it is not whole.
  """
  from safetensors import safe_open

  try:
    with safe_open(path, framework='numpy') as f:
      return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
  except FileNotFoundError as e:
    raise CheckpointError(f'No file {path!r}.') from e
  except Exception as e:  # safetensors has its own error type for bad bytes
    raise CheckpointError(f'{path}: not a whole safetensors file: {e}') from e


def load_header(path: str) -> dict[str, str]:
  """The header alone of a `trainable.safetensors`.

  Raises:
    CheckpointError: as `load_trainable`.
  """
  from safetensors import safe_open

  try:
    with safe_open(path, framework='numpy') as f:
      return f.metadata() or {}
  except Exception as e:
    raise CheckpointError(f'{path}: not a whole safetensors file: {e}') from e


def check_origin(
  made_with: Mapping[str, Any],
  where: str,
  base: fingerprints.Fingerprint | None,
  vocabulary: str | None,
  advice: str = fingerprints.ADVICE,
) -> None:
  """Compares what parameters were trained with to what is here.

  Args:
    made_with: `base` and `vocabulary`, fingerprints; None where not known.
    where: they lie, for the message.
    base: fingerprint of the base that has been loaded; None skips it.
    vocabulary: fingerprint of the vocabulary here; None skips it.
    advice: what to do about another base, the end of the message.

  Raises:
    CheckpointError: another vocabulary.
    fingerprints.BaseMismatch: another frozen base.
  """
  saved = made_with.get('base')
  if saved is not None and base is not None:
    fingerprints.check(saved, base, where, advice)
  saved = made_with.get('vocabulary')
  if None not in (saved, vocabulary) and saved != vocabulary:
    raise CheckpointError(
      f'{where} was trained with another vocabulary (fingerprint {saved}; the '
      f'one loaded here is {vocabulary}). Give the VOCABULARY_PATH of that run.'
    )
