"""PEFT's training step on PyTorch, and its matrix product, as contestants.

The sizes are those of our contestant, the weights random. Soft tokens stand in
front of the encoder only (`num_transformer_submodules=1`), as in the paper.
"""

import argparse
import json
import pathlib
from typing import Any

import peft
import torch
from torch.utils import flop_counter
import transformers
from transformers import optimization

from lib import workers

_LEARNING_RATE = 0.3
_FEED_FORWARD = {
  ('gelu', 'linear'): 'gated-gelu',
  ('relu',): 'relu',
}


def _device() -> str:
  return 'cuda' if torch.cuda.is_available() else 'cpu'


def _wait() -> None:
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def _network(sizes: dict[str, Any], dropout: float) -> Any:
  """Transformers' T5 of the sizes in our `T5Config`."""
  config = transformers.T5Config(
    vocab_size=sizes['vocab_size'],
    d_model=sizes['emb_dim'],
    d_kv=sizes['head_dim'],
    d_ff=sizes['mlp_dim'],
    num_layers=sizes['num_encoder_layers'],
    num_decoder_layers=sizes['num_decoder_layers'],
    num_heads=sizes['num_heads'],
    relative_attention_num_buckets=sizes['relpos_num_buckets'],
    relative_attention_max_distance=sizes['relpos_max_distance'],
    feed_forward_proj=_FEED_FORWARD[tuple(sizes['mlp_activations'])],
    tie_word_embeddings=sizes['logits_via_embedding'],
    dropout_rate=dropout,
    decoder_start_token_id=0,
    use_cache=False,  # nothing is decoded: its keys would be kept for nobody
  )
  return transformers.T5ForConditionalGeneration(config)


class Peft:
  """The step of PEFT's prompt tuning, with transformers' Adafactor."""

  def __init__(self, args: argparse.Namespace, dtype: str):
    imports = workers.resident_bytes()
    torch.manual_seed(0)
    sizes = json.loads(args.sizes)
    network = _network(sizes, args.dropout).to(_device(), getattr(torch, dtype))
    settings = peft.PromptTuningConfig(
      task_type=peft.TaskType.SEQ_2_SEQ_LM,
      num_virtual_tokens=args.prompt,
      num_transformer_submodules=1,
    )
    self._model = peft.get_peft_model(network, settings).train()
    trained = [p for p in self._model.parameters() if p.requires_grad]
    self._optimizer = optimization.Adafactor(
      trained,
      lr=_LEARNING_RATE,
      scale_parameter=False,
      relative_step=False,
      # Multiplied by the learning rate there, unlike T5X's.
      weight_decay=1e-5 / _LEARNING_RATE,
    )
    inputs, targets = (
      torch.as_tensor(ids, dtype=torch.long, device=_device())
      for ids in workers.random_batch(
        args.batch, args.inputs, args.targets, sizes['vocab_size']
      )
    )
    self._batch = {
      'input_ids': inputs,
      'attention_mask': torch.ones_like(inputs),
      'labels': targets,
    }
    self.info = {
      'platform': _device(),
      'version': (
        f'peft {peft.__version__}, torch {torch.__version__}, '
        f'transformers {transformers.__version__}'
      ),
      'threads': torch.get_num_threads(),
      'attention': network.config._attn_implementation,
      'trained': sum(p.numel() for p in trained),
      'imports_bytes': imports,
    }

  def step(self, count: int) -> None:
    """`count` updates, one after the other."""
    for _ in range(count):
      loss = self._model(**self._batch).loss
      loss.backward()
      self._optimizer.step()
      self._optimizer.zero_grad()
    _wait()
    if not bool(loss.isfinite()):
      raise FloatingPointError('The loss is not finite.')

  def finish(self, directory: str) -> dict[str, Any]:
    """Sizes of what is saved, the device's peak memory, and FLOPs.

    The FLOPs are those of products, as PyTorch counts them.
    """
    cuda = torch.cuda.is_available()
    device = torch.cuda.max_memory_allocated() if cuda else None
    root = pathlib.Path(directory)
    self._model.save_pretrained(root / 'trained', save_embedding_layers=False)
    trained = workers.size_of(root / 'trained')
    # What transformers' Trainer adds in order to go on.
    path = root / 'trained' / 'optimizer.pt'
    torch.save(self._optimizer.state_dict(), path)
    with flop_counter.FlopCounterMode(display=False) as counter:
      self.step(1)
    return {
      'device_bytes': device,
      'trained_bytes': trained,
      'checkpoint_bytes': workers.size_of(root / 'trained'),
      'flops': counter.get_total_flops(),
    }


class Product:
  """A product of two square matrices: the peak, as PyTorch reaches it."""

  def __init__(self, size: int, dtype: str):
    self._x, self._y = (
      torch.randn(size, size).to(_device(), getattr(torch, dtype))
      for _ in range(2)
    )
    version = f'torch {torch.__version__}'
    self.info = {'version': version, 'flops': 2 * size**3}

  def step(self, count: int) -> None:
    """`count` products."""
    for _ in range(count):
      torch.matmul(self._x, self._y)
    _wait()

  def finish(self, directory: str) -> dict[str, Any]:
    """Nothing to say."""
    del directory
    return {}
