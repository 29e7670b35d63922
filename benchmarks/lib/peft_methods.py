"""Steps of PEFT's own versions of our methods, on PyTorch.

Sizes are those of our methods' files; where PEFT's method differs, `NOTES` says
how. Soft tokens stand in the encoder only (`num_transformer_submodules=1`).
"""

import argparse
from collections.abc import Callable
import json
from typing import Any

import peft
import torch
from transformers import optimization

from lib import peft_torch
from lib import workers

# Where what is compared is not the same arithmetic.
NOTES = {
  'prefix_tuning': "PEFT's prefixes are in the decoder alone",
  'p_tuning_mlp': "PEFT's MLP has three layers",
}
# Those whose file has Adafactor; the others have AdamW.
_ADAFACTOR = ('ia3', 'mpt', 'soft_prompt')


def _lora(rank: int = 8, **fields: Any) -> Callable[[Any], Any]:
  def make(sizes: Any) -> Any:
    del sizes
    return peft.LoraConfig(
      task_type=peft.TaskType.SEQ_2_SEQ_LM,
      r=rank,
      lora_alpha=16,
      lora_dropout=0.0,
      target_modules=['q', 'v'],
      **fields,
    )

  return make


def _soft(cls: Any, tokens: int, **fields: Any) -> Any:
  return cls(
    task_type=peft.TaskType.SEQ_2_SEQ_LM,
    num_virtual_tokens=tokens,
    **fields,
  )


def _p_tuning(kind: str, width: Callable[[int], int]) -> Callable[[Any], Any]:
  return lambda sizes: _soft(
    peft.PromptEncoderConfig,
    9,
    num_transformer_submodules=1,
    encoder_reparameterization_type=kind,
    encoder_hidden_size=width(sizes['emb_dim']),
    encoder_dropout=0.0,
  )


# From our `T5Config` as a dict to PEFT's configuration.
SETTINGS: dict[str, Callable[[Any], Any]] = {
  'dora': _lora(use_dora=True),
  'ia3': lambda _: peft.IA3Config(
    task_type=peft.TaskType.SEQ_2_SEQ_LM,
    target_modules=['k', 'v', 'wo'],
    feedforward_modules=['wo'],
  ),
  'lora': _lora(),
  'mpt': lambda _: _soft(
    peft.MultitaskPromptTuningConfig,
    100,
    num_transformer_submodules=1,
    num_tasks=1,
    num_ranks=1,
  ),
  'p_tuning': _p_tuning('LSTM', lambda width: width // 2),
  'p_tuning_mlp': _p_tuning('MLP', lambda width: width),
  'prefix_tuning': lambda _: _soft(
    peft.PrefixTuningConfig,
    20,
    prefix_projection=True,
    encoder_hidden_size=512,
  ),
  'rslora': _lora(64, use_rslora=True),
  'soft_prompt': lambda _: _soft(
    peft.PromptTuningConfig, 100, num_transformer_submodules=1
  ),
}


class Steps:
  """PEFT's methods on one model, all in this process."""

  def __init__(self, args: argparse.Namespace):
    self._args = args
    self._ready: dict[str, Any] = {}

  def names(self) -> list[str]:
    """Of the methods that PEFT has."""
    return list(SETTINGS)

  def count(self, name: str) -> dict[str, Any]:
    """Makes the method ready, on a random network."""
    args = self._args
    torch.manual_seed(0)
    sizes = json.loads(args.sizes)
    network = peft_torch._network(sizes, args.dropout).to(peft_torch._device())
    model = peft.get_peft_model(network, SETTINGS[name](sizes)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if name in _ADAFACTOR:
      optimizer: Any = optimization.Adafactor(
        trained, lr=1e-3, scale_parameter=False, relative_step=False
      )
    else:
      optimizer = torch.optim.AdamW(trained, lr=1e-3)
    inputs, targets = (
      torch.as_tensor(ids, dtype=torch.long, device=peft_torch._device())
      for ids in workers.random_batch(
        args.batch, args.inputs, args.targets, sizes['vocab_size']
      )
    )
    batch = {
      'input_ids': inputs,
      'attention_mask': torch.ones_like(inputs),
      'labels': targets,
    }
    if name == 'mpt':
      batch['task_ids'] = torch.zeros(len(inputs), dtype=torch.long)
    self._ready[name] = model, optimizer, batch
    return {
      'trained': sum(p.numel() for p in trained),
      'version': f'peft {peft.__version__}, torch {torch.__version__}',
      'threads': torch.get_num_threads(),
    }

  def step(self, name: str) -> None:
    """One update."""
    model, optimizer, batch = self._ready[name]
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    peft_torch._wait()
    if not bool(loss.isfinite()):
      raise FloatingPointError(f'{name}: the loss is not finite.')
