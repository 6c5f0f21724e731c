"""What the fork server imports before it forks ranks. It must not create a process group or a CUDA context."""

import gc
import warnings

import torch

from megalign.parallel.patches import import_megatron

torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_megatron()
    import megalign.sft  # noqa: F401
gc.collect()
gc.freeze()  # what every rank has from here need not be looked through again
