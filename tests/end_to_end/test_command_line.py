"""The command line as a user meets it: clear errors, exit codes, a killed rank, Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megalign.parallel.checkpoint import list_checkpoints, verify

TINY = (
    "data.max_rows=60 data.validation_rows=4 data.tokenizer.vocab_size=300 train.micro_batch_size=1 train.global_batch_size=4 "
    "train.sample_prompts=1 train.sample_tokens=4 optimizer.lr_warmup_steps=2 model.hidden_size=32 model.num_layers=2 "
    "model.ffn_hidden_size=48 train.max_steps=400 train.save_interval=5 train.keep_last=3"
).split()


def megalign(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run the command; its environment is not that of a rank."""
    return subprocess.run([sys.executable, "-m", "megalign", *arguments], capture_output=True, text=True, timeout=120, **options)


def start(output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megalign", "sft", "sft-dense", *TINY, f"output={output}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_checkpoint(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.time() + 90
    while not list_checkpoints(output / "checkpoints"):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.1)


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


ERRORS = {
    "unknown key": (["optimizer.lerning_rate=1e-4"], "did you mean optimizer.lr"),
    "wrong type": (["train.max_steps=many"], "train.max_steps"),
    "missing file": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "empty file": (["data.train={tmp}/empty.jsonl"], "empty.jsonl: the file holds no rows"),
    "wrong format": (["data.train={tmp}/wrong.jsonl"], "wrong.jsonl"),
    "no file": (["data.train=[]"], "data.train=[]: names no file"),
    "an output that cannot be": (["output=/proc/nowhere"], "output=/proc/nowhere: this folder cannot be made"),
    "a world that does not fit": (["parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size(3)"),
}


def test_bad_input_is_one_clear_message(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "wrong.jsonl").write_text('{"who": "you", "what": "me"}\n' * 3)
    for name, (arguments, expected) in ERRORS.items():
        filled = [argument.format(tmp=tmp_path) for argument in arguments]
        done = megalign("sft", "sft-dense", f"output={tmp_path / name.replace(' ', '-')}", *filled)
        assert done.returncode == 1, (name, done)
        assert expected in done.stderr and "Traceback" not in done.stderr, (name, done.stderr)


def test_a_recipe_that_does_not_exist_lists_those_that_do():
    done = megalign("sft", "quikstart")
    assert done.returncode == 1 and "quickstart" in done.stderr and "Traceback" not in done.stderr


def test_dry_run_makes_no_weights_and_no_folder(tmp_path: Path):
    done = megalign("sft", "quickstart", f"output={tmp_path / 'run'}", "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in ("parameters", "weights", "gradients", "effective batch", "steps", "tokens", "first training row"):
        assert part in done.stdout.lower(), part
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_no_weights(tmp_path: Path):
    """An 8B model of which there is the configuration and a tokenizer: its 8.03 billion parameters are counted, none is there to be read."""
    from transformers import LlamaConfig

    done = megalign("data", "tokenizer", str(write_text(tmp_path)), "--vocab-size", "300", "--output", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "hf")  # fmt: skip
    assert not list((tmp_path / "hf").glob("*.safetensors"))
    done = megalign("sft", "sft-from-hf", f"model.init_from={tmp_path / 'hf'}", "data.max_rows=120", f"output={tmp_path / 'run'}", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "8.03" in done.stdout and not (tmp_path / "run").exists()


def write_text(folder: Path) -> Path:
    """Eight documents of plain text."""
    (folder / "a.txt").write_text("\n\n".join(DOCUMENTS))
    return folder / "a.txt"


DOCUMENTS = [f"The fox number {n} lives at harbour {n * 7 % 13}, and sleeps {'well ' * (n % 4)}there." for n in range(8)]


def test_a_killed_rank_loses_nothing_and_leaves_no_orphan(tmp_path: Path):
    """kill -9 of one of two ranks: one message, exit code 1, all processes gone, the checkpoint good, and then resumed."""
    output = tmp_path / "run"
    two = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    process = start(output, *two)
    wait_for_checkpoint(process, output)
    family = descendants(process)
    ranks = [child for child in family if "megalign" in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "of 2 was killed by SIGKILL" in errors and errors.count("error:") == 1, errors
    assert not psutil.wait_procs(family, timeout=10)[1], "orphans"
    last = list_checkpoints(output / "checkpoints")[-1]
    verify(last)
    step = int(last.name.split("_")[1])
    done = megalign("sft", "sft-dense", *TINY, f"output={output}", *two, f"train.stop_at_step={step + 2}")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, step + 3))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_all_ranks(tmp_path: Path, ranks: int):
    output = tmp_path / "run"
    more = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"] if ranks == 2 else []
    process = start(output, *more)
    wait_for_checkpoint(process, output)
    family = descendants(process)
    os.kill(process.pid, signal.SIGINT)  # the ranks are in sessions of their own: the launcher has to tell them
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "continues from the last complete checkpoint when repeated" in errors
    assert not psutil.wait_procs(family, timeout=10)[1], "orphans"
    for checkpoint in list_checkpoints(output / "checkpoints"):
        verify(checkpoint)


def test_pretrain_scores_every_token_of_plain_text(tmp_path: Path):
    """One step is the whole text: by the run's own tokenizer, read by transformers, a token each and the end of each document."""
    from transformers import AutoTokenizer

    more = ["data.validation_rows=2", "data.packing=false", "train.global_batch_size=6", "train.max_steps=30", "train.save_interval=null", "train.sample_prompts=0"]
    done = megalign("pretrain", "sft-dense", *TINY, f"data.train={write_text(tmp_path)}", f"output={tmp_path / 'run'}", "optimizer.lr=5e-3", *more)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in rows if row["kind"] == "train"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in DOCUMENTS[:6])
    told = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert first["num_tokens"] == tokens and told["scored_tokens"] == tokens - 6  # nothing predicts a document's first
    assert 0 < last["loss"] < first["loss"] - 1
    assert "loss_on: all" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_train_chat_convert_and_start_from_the_result(tmp_path: Path):
    """The way of a checkpoint: train, ask, write as Hugging Face, load there, and start another run from it."""
    import torch
    from transformers import AutoModelForCausalLM

    run, folder = tmp_path / "run", tmp_path / "hf"
    done = megalign("sft", "sft-dense", *TINY, f"output={run}", "train.max_steps=40", "optimizer.lr=5e-3")
    assert done.returncode == 0, done.stderr
    done = megalign("chat", str(run), "--prompt", "Where does she sleep?", "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    done = megalign("convert", str(run), str(folder))
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2 and not any(torch.isnan(p).any() for p in model.parameters())
    start_from = [f"model.init_from={folder}", *(a for a in TINY if not a.startswith("model.")), f"output={tmp_path / 'again'}"]
    done = megalign("sft", "sft-from-hf", *start_from, "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    (again, *_), trained = (losses(output) for output in (tmp_path / "again", run))
    assert again < trained[0] - 0.5  # it starts where the other run ended, not at random
