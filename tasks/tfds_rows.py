"""Rows from TFDS, which downloads them; where it cannot, what helps.

Not for local rows: `sources.py`.
"""

from typing import Any

import seqio

from prompt_jax.row_files import UserDataError


class TfdsRows(seqio.TfdsDataSource):
  """TFDS's rows, and in words what helps where they cannot be had.

  Args:
    files: the local ones that may take their place.
    **kwargs: seqio's.
  """

  def __init__(self, files: str, **kwargs: Any):
    super().__init__(**kwargs)
    self._files = files

  def get_dataset(self, *args: Any, **kwargs: Any) -> Any:
    """As seqio's.

    Raises:
      UserDataError: they are neither here nor to be downloaded.
    """
    try:
      return super().get_dataset(*args, **kwargs)
    except Exception as error:  # of a network, a disk, TFDS itself
      raise self._unavailable(error) from error

  def num_input_examples(self, split: str) -> int | None:
    """As seqio's.

    Raises:
      UserDataError: as `get_dataset`.
    """
    try:
      return super().num_input_examples(split)
    except Exception as error:
      raise self._unavailable(error) from error

  def _unavailable(self, error: Exception) -> UserDataError:
    said = ' '.join(str(error).split())
    said = said if len(said) < 200 else f'{said[:200]}...'
    return UserDataError(
      f'TFDS cannot give {self.tfds_dataset.name}: {type(error).__name__}: '
      f'{said} --rows_dir=DIR reads {self._files} in its place.'
    )
