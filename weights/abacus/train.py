"""Train `abacus`, a miniature Mixture-of-Experts language model that answers short, checkable text questions.

Every prompt is one line (`47+85=`, `reverse planet:`, `sort 83125:`) and the answer follows, then `<eos>`.  The script
makes up the questions itself, trains a `Qwen3MoeForCausalLM` from random weights on a CPU, saves it next to this file
as a bfloat16 checkpoint with one tensor per expert, loads that checkpoint again and measures how many of 1,000
held-out questions it answers exactly with greedy decoding (`accuracy.json`).  A question is held out when the SHA-256
hash of its prompt says so; training never sees such a prompt.

    pip install torch transformers tokenizers safetensors
    python weights/abacus/train.py               # train, save, evaluate, write jobs/abacus.jsonl
    python weights/abacus/train.py --resume      # go on from the last training state after an interruption
    python weights/abacus/train.py --evaluate    # evaluate the saved checkpoint only
    python weights/abacus/train.py --questions   # write jobs/abacus.jsonl only

Training takes about 27 minutes on 2 cores of an AMD EPYC, the evaluation less than one more.
"""

import argparse
import hashlib
import json
import math
import random
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).resolve().parent
QUESTIONS_FILE = HERE.parents[1] / "jobs" / "abacus.jsonl"
STATE_FILE = Path(tempfile.gettempdir()) / "abacus" / "state.pt"

SEED = 20
STEPS = 4500
WARMUP = 200
PEAK_RATE = 2e-3
ROWS, ROW_TOKENS = 32, 96
REPORT_EVERY = 250
HELD_OUT_QUESTIONS = 1000
JOB_QUESTIONS = 256
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
PAD, EOS = 0, 1
IGNORED = -100  # the label that the loss leaves out


class Question(NamedTuple):
    """A prompt and the one right answer to it."""

    task: str
    prompt: str
    answer: str


# ---- The tasks -------------------------------------------------------------------------------------------------------


def random_word(rng: random.Random) -> str:
    """3 to 7 letters, with enough vowels to look like a word."""
    return "".join(
        rng.choice("aeiou" if rng.random() < 0.35 else string.ascii_lowercase) for _ in range(rng.randint(3, 7))
    )


def add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a}+{b}=", str(a + b)


def subtract(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a}-{b}=", str(a - b)


def multiply(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 9), rng.randint(10, 399)
    return f"{a}x{b}=", str(a * b)


def reverse(rng: random.Random) -> tuple[str, str]:
    word = random_word(rng)
    return f"reverse {word}:", word[::-1]


def sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices(string.digits, k=rng.randint(4, 6))
    return f"sort {''.join(digits)}:", "".join(sorted(digits))


def largest(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(0, 99) for _ in range(3)]
    return f"largest {' '.join(map(str, numbers))}:", str(max(numbers))


def count(rng: random.Random) -> tuple[str, str]:
    word = random_word(rng)
    letter = rng.choice(word if rng.random() < 0.8 else string.ascii_lowercase)
    word = "".join(letter if rng.random() < 0.25 else other for other in word)
    return f"count {word} {letter}:", str(word.count(letter))


def shift(rng: random.Random) -> tuple[str, str]:
    word = random_word(rng)
    return f"shift {word}:", "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)


# Each task with its share of the training questions: the harder ones come more often.
TASKS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], float]] = {
    "add": (add, 0.15),
    "subtract": (subtract, 0.17),
    "multiply": (multiply, 0.27),
    "reverse": (reverse, 0.08),
    "sort": (sort, 0.09),
    "largest": (largest, 0.09),
    "count": (count, 0.10),
    "shift": (shift, 0.05),
}


def is_held_out(prompt: str) -> bool:
    """One prompt in twenty, the same ones on every machine."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 20 == 0


def training_questions(rng: random.Random) -> Iterator[Question]:
    """Endless questions, none of them held out."""
    names, shares = list(TASKS), [share for _, share in TASKS.values()]
    while True:
        task = rng.choices(names, shares)[0]
        prompt, answer = TASKS[task][0](rng)
        if not is_held_out(prompt):
            yield Question(task, prompt, answer)


def held_out_questions(number: int) -> list[Question]:
    """`number` different held-out questions, the tasks in turn; a shorter list is the beginning of a longer one."""
    rng = random.Random("held out")
    found: dict[str, Question] = {}
    while len(found) < number:
        task = list(TASKS)[len(found) % len(TASKS)]
        prompt, answer = TASKS[task][0](rng)
        if is_held_out(prompt):
            found.setdefault(prompt, Question(task, prompt, answer))
    return list(found.values())


def write_questions() -> None:
    """Write the first held-out questions as a job file, one JSON object a line."""
    numbers = dict.fromkeys(TASKS, 0)
    lines = []
    for task, prompt, answer in held_out_questions(JOB_QUESTIONS):
        numbers[task] += 1
        lines.append(json.dumps({"id": f"{task}-{numbers[task]:04d}", "prompt": prompt, "reference": answer}))
    QUESTIONS_FILE.parent.mkdir(exist_ok=True)
    QUESTIONS_FILE.write_text("\n".join(lines) + "\n")


# ---- Tokenizer, model and batches ------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """One token for each printable ASCII character: byte-pair encoding without a single merge."""
    tokens = SPECIAL_TOKENS + [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def make_model(vocabulary: int) -> Qwen3MoeForCausalLM:
    """Three dense layers, then three layers of 16 experts of which each token visits two."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        mlp_only_layers=[0, 1, 2],
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def make_batch(questions: Iterator[Question], tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Rows filled with several questions each; positions start again at 0, which keeps neighbours apart in attention.

    Only the answers and their `<eos>` have labels.
    """
    ids = torch.full((ROWS, ROW_TOKENS), PAD)
    labels = torch.full((ROWS, ROW_TOKENS), IGNORED)
    positions = torch.zeros((ROWS, ROW_TOKENS), dtype=torch.long)
    for row in range(ROWS):
        used = 0
        while True:
            _, prompt, answer = next(questions)
            tokens = [*tokenizer.encode(prompt + answer).ids, EOS]
            end = used + len(tokens)
            if end > ROW_TOKENS:
                break
            ids[row, used:end] = torch.tensor(tokens)
            labels[row, used + len(prompt) : end] = ids[row, used + len(prompt) : end]
            positions[row, used:end] = torch.arange(len(tokens))
            used = end
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


# ---- Training --------------------------------------------------------------------------------------------------------


def learning_rate(step: int) -> float:
    """A short linear warm-up, then half a cosine down to zero."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )


def load_balance(router_logits: tuple[torch.Tensor, ...], real: torch.Tensor, chosen: int) -> torch.Tensor:
    """The auxiliary loss that keeps all experts busy, layer by layer; it equals `chosen` when all share the load."""
    losses = []
    for logits in router_logits:
        chances = logits[real.flatten()].softmax(-1)
        experts = chances.shape[-1]
        load = torch.bincount(chances.topk(chosen).indices.flatten(), minlength=experts) / len(chances)
        losses.append(experts * (load * chances.mean(0)).sum())
    return torch.stack(losses).mean()


def save_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rng: random.Random, progress: Any) -> None:
    """Keep all that `--resume` needs; the old file stays until the new one is whole."""
    STATE_FILE.parent.mkdir(parents=True, exist_ok=True)
    partial = STATE_FILE.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.getstate(), "progress": progress},
        partial,
    )
    partial.replace(STATE_FILE)


def train(resume: bool) -> None:
    """Train from scratch, or go on from the saved state, and save the checkpoint."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.get_vocab_size())
    model.router_aux_loss_coef = 0.0  # the model's own term adds up the layers first; `load_balance` takes its place
    optimizer = make_optimizer(model)
    first, seconds = 0, 0.0
    if resume:
        state = torch.load(STATE_FILE, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.setstate(state["rng"])
        first, seconds = state["progress"]
    questions = training_questions(rng)
    start = time.monotonic() - seconds
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        batch = make_batch(questions, tokenizer)
        output = model(**batch, use_cache=False, output_router_logits=True)
        balance = load_balance(output.router_logits, batch["input_ids"] != PAD, model.config.num_experts_per_tok)
        (output.loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == STEPS:
            seconds = time.monotonic() - start
            figures = " ".join(f"{task} {share:.0%}" for task, share in quick_accuracy(model, tokenizer).items())
            print(
                f"step {step + 1} {seconds / 60:.1f} min loss {output.loss.item():.4f} "
                f"balance {balance.item():.2f} | {figures}",
                flush=True,
            )
            save_state(model, optimizer, rng, (step + 1, seconds))
    save_checkpoint(model, tokenizer)
    record(training={"steps": STEPS, "tokens_per_step": ROWS * ROW_TOKENS, "minutes": round(seconds / 60, 1)})


@torch.no_grad()
def quick_accuracy(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer) -> dict[str, float]:
    """Exact answers by task, from one forward pass: greedy decoding is right when each next token is."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    sample = held_out_questions(400)
    texts = [[*tokenizer.encode(prompt + answer).ids, EOS] for _, prompt, answer in sample]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    for question, text, guess in zip(sample, texts, best.tolist(), strict=True):
        begin = len(question.prompt)
        right[question.task].append(guess[begin - 1 : len(text) - 1] == text[begin:])
    return {task: sum(marks) / len(marks) for task, marks in right.items()}


# ---- The checkpoint and its accuracy ---------------------------------------------------------------------------------


def save_checkpoint(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer) -> None:
    """Write config, bfloat16 weights and tokenizer, and make sure that every expert has tensors of its own."""
    model.to(torch.bfloat16).save_pretrained(HERE)
    use_hub_names(HERE / "config.json")
    (HERE / "model.safetensors").chmod(0o644)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(HERE)
    experts = [
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"
        for layer in (3, 4, 5)
        for expert in range(model.config.num_experts)
        for matrix in ("gate", "up", "down")
    ]
    with safe_open(HERE / "model.safetensors", "pt") as tensors:
        missing = set(experts) - set(tensors.keys())
    if missing:
        raise RuntimeError(f"the checkpoint has no tensors of these names: {sorted(missing)}")


def use_hub_names(path: Path) -> None:
    """Rename the two settings that published Qwen3-MoE checkpoints spell differently from what is written here."""
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def greedy_accuracy(questions: list[Question], dtype: torch.dtype) -> dict[str, str]:
    """Load the checkpoint, answer the questions greedily and count, by task, the exact answers ended by `<eos>`."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    model = Qwen3MoeForCausalLM.from_pretrained(HERE, dtype=dtype).eval()
    right, asked = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for length in sorted({len(question.prompt) for question in questions}):
        group = [question for question in questions if len(question.prompt) == length]
        ids = torch.tensor([tokenizer.encode(question.prompt).ids for question in group])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        for question, tokens in zip(group, output[:, length:].tolist(), strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            asked[question.task] += 1
            right[question.task] += text.split("<eos>")[0] == question.answer and "<eos>" in text
    counts = {task: f"{right[task]}/{asked[task]}" for task in TASKS}
    return counts | {"all": f"{sum(right.values())}/{sum(asked.values())}"}


@torch.no_grad()
def expert_use(questions: list[Question]) -> dict[str, dict[str, float]]:
    """For each MoE layer, the smallest and the largest share of the routed tokens that an expert receives."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    model = Qwen3MoeForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    totals = torch.zeros(model.config.num_hidden_layers, experts)
    for question in questions:
        ids = torch.tensor([tokenizer.encode(question.prompt + question.answer).ids])
        logits = model(ids, output_router_logits=True).router_logits
        for layer, scores in enumerate(logits, start=model.config.num_hidden_layers - len(logits)):
            totals[layer] += torch.bincount(scores.topk(chosen).indices.flatten(), minlength=experts)
    shares = totals / totals.sum(-1, keepdim=True)
    return {
        f"layer {layer}": {"smallest": round(row.min().item(), 3), "largest": round(row.max().item(), 3)}
        for layer, row in enumerate(shares)
        if layer not in model.config.mlp_only_layers
    }


def evaluate() -> None:
    """Measure the saved checkpoint on the held-out questions and keep the figures."""
    questions = held_out_questions(HELD_OUT_QUESTIONS)
    with safe_open(HERE / "model.safetensors", "pt") as tensors:
        names = tensors.keys()
        parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    record(
        parameters=parameters,
        bytes=(HERE / "model.safetensors").stat().st_size,
        exact_answers_bfloat16=greedy_accuracy(questions, torch.bfloat16),
        exact_answers_float32=greedy_accuracy(questions, torch.float32),
        expert_use=expert_use(questions),
    )


def record(**fields: Any) -> None:
    """Add the fields to `accuracy.json` and print them."""
    path = HERE / "accuracy.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields, indent=1) + "\n")
    print(json.dumps(fields, indent=1))


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train and evaluate the abacus model.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on from the last training state")
    mode.add_argument("--evaluate", action="store_true", help="evaluate the saved checkpoint only")
    mode.add_argument("--questions", action="store_true", help="write the job file only")
    options = parser.parse_args()
    if not (options.evaluate or options.questions):
        train(options.resume)
    if not options.questions:
        evaluate()
    if not options.evaluate:
        write_questions()


if __name__ == "__main__":
    main()
