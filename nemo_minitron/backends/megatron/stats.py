"""Importance statistics from forward hooks on a Megatron model.

Every rank fills the rows of its own layers and channels in a zero tensor of the whole model's
size; one sum over all ranks then gives every rank the whole statistic, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from nemo_minitron.backends.megatron.forward import Batch, evaluating, forward_batches, token_nll
from nemo_minitron.backends.megatron.layout import shard_range
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.families import ModelShape
from nemo_minitron.progress import Progress
