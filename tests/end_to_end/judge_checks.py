"""Rewards of drawn answers by hand, and by judges that are broken on purpose, inside ranks that a fork server started."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from mutants import mutant  # noqa: E402

# What is broken in megalign/judges.py: piece of its source, and what takes its place.
MUTATIONS = {
    "the reference is scored": ("said = [_said(row, text)", "said = [row"),
    "the answer of the next candidate is scored": ("for text in texts]\n        members", "for text in (*texts[1:], texts[0])]\n        members"),
    "the prompt is not read": ("(*row.messages[:-1], Message", "(*row.messages[-2:-1], Message"),
    "what models disagree on counts more": ("alpha=asked.alpha)", "alpha=-asked.alpha)"),
    "the mean alone": ("alpha=asked.alpha)", "alpha=0.0)"),
    "the first model alone": ("if len(members) > 1 else members[0]", "if len(members) > 9 else members[0]"),
    "rewards on different scales": ("return scorer.normalised(head, rewards) if scorer.normalisation[head] else rewards", "return rewards"),
    "the other head": ("return asked or names[0]", "return names[-1]"),
    "scores of one prompt to the next": ("np.split(total, ends[:-1])", "np.split(np.roll(total, len(answers[0])), ends[:-1])"),
}


def by_hand(jobs: list[tuple[str, list[list[dict[str, str]]]]]) -> list[dict[str, list[float]]]:
    """(checkpoint, dialogues) -> {head: normalised reward of each dialogue}, one at a time, unpadded: w . h + b of the last token in float64.

    Tokens are those of the tokenizer's own chat template, prompt and answer each by itself.
    """
    import numpy as np

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.scoring import RewardScorer
    from megalign.serving import find_checkpoint

    found = []
    for path, dialogues in jobs:
        scorer = RewardScorer.load(Path(path), ["data.sequence_length=512"], read_world(os.environ))
        states: list[Any] = []
        model: Any = scorer.engine.models[0]
        model = getattr(model, "module", model)
        hook = model.decoder.final_layernorm.register_forward_hook(lambda module, args, output, states=states: states.append(output.detach()))
        kept = json.loads((find_checkpoint(Path(path)) / "reward.json").read_text())
        rewards: dict[str, list[float]] = {name: [] for name in kept}
        for messages in dialogues:
            prompt, whole = (str(scorer.tokenizer.hf.apply_chat_template(part, tokenize=False, add_generation_prompt=part is not messages)) for part in (messages[:-1], messages))
            said = messages[-1]["content"]
            assert whole.startswith(prompt + said)
            parts = ((prompt, False), (said, True), (whole[len(prompt + said) :], False))  # what is said cannot forge a control token
            ids = np.concatenate([scorer.tokenizer.hf(part, add_special_tokens=False, split_special_tokens=plain)["input_ids"] for part, plain in parts]).astype(np.int32)
            states.clear()
            scorer.values([ids])
            (hidden,) = states
            last = hidden[len(ids) - 1, 0].double()
            for name, facts in kept.items():
                head = model.heads[f"{name}_head"]
                reward = float(head.weight[0].double() @ last) + (float(head.bias[0]) if head.bias is not None else 0.0)
                rewards[name].append((reward - facts["mean"]) / facts["std"])
        hook.remove()
        destroy_grid()
        found.append(rewards)
    return found


def broken(recipe: dict[str, Any], rows: list[tuple[list[dict[str, str]], list[str]]], scratch: str) -> dict[str, list[list[float]]]:
    """(messages with the reference, answers) -> scores by the recipe's sound judge, and by each that is broken."""
    from megalign import judges
    from megalign.config.schema import Recipe
    from megalign.data.rows import Conversation, Message
    from megalign.models.resolve import resolve_model
    from megalign.parallel.init import read_world

    made = Recipe.model_validate(recipe)
    conversations = [Conversation(tuple(Message(message["role"], message["content"]) for message in messages)) for messages, _ in rows]
    modules = {"sound": judges} | {name: mutant(judges, Path(scratch), *change) for name, change in MUTATIONS.items()}
    world = read_world(os.environ)
    return {name: module.judge_of(made.best_of_n, "best_of_n", resolve_model(made), world).score(conversations, [answers for _, answers in rows]) for name, module in modules.items()}
