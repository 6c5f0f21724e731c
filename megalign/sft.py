"""Supervised fine-tuning: next-token cross-entropy on the assistant's turns. `pretrain` is the same loop on text.

    L = - sum over scored tokens of log p(token | tokens before it)  /  number of scored tokens in the global batch
"""

from __future__ import annotations

from torch import Tensor

from megalign.batch import Batch
from megalign.config.schema import Recipe
from megalign.losses import TokenLoss, cross_entropy_loss
from megalign.parallel.init import World
from megalign.trainer.engine import Engine
from megalign.trainer.objective import Objective
from megalign.trainer.session import Algorithm, open_session


def sft(recipe: Recipe, world: World) -> None:
    """Fine-tune as the recipe says, on every rank of the world (collective).

    Raises ConfigError, DataError, RunError, CheckpointError or TrainingStopped, each with what to do, and Preempted
    after SIGTERM or SIGUSR1, with the last step saved.
    """
    session = open_session(recipe, world)
    engine = Engine(session.recipe, session.grid, session.vocab_size)
    session.carry_out(engine, Algorithm(Objective(token_loss)))


def token_loss(output: Tensor, batch: Batch) -> TokenLoss:
    """Cross-entropy of what the model's last stage returned for a microbatch."""
    logprobs, correct = output
    return cross_entropy_loss(logprobs, correct)
