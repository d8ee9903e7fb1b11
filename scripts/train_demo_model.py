"""Train the built-in demo model: a byte-level BPE tokenizer and a small Llama that tells stories.

    python scripts/train_demo_model.py --output distributed_llm/builtin_model

Every text comes from `story_grammar`, so nothing is downloaded. With the same seed, steps, threads
and library versions the same machine writes the same bytes. `--minutes` stops by the clock, so its
result does not repeat.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import torch
from story_grammar import Turn, tell, tell_chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, EOS = 0, 1, 2
IGNORED = -100
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('Roles are system, user and assistant.') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] | trim -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# Built-in demo model

A Llama of {parameters:,} parameters that tells little stories, small enough to travel with the
package and deep enough ({layers} layers) to be split over several workers. It knows nothing else.

`scripts/train_demo_model.py` made it: a byte-level BPE tokenizer and the model, trained from
nothing on text that `scripts/story_grammar.py` draws at random. No other data went into it. Seed
{seed}, {steps} steps; {loss:.3f} nats per token on held-out stories.

Start a text ("Once upon a time", "The old robot") or chat ("Tell me a story about a dragon.").
In a chat it keeps to the first character asked for; a second one, or a thing, it often forgets,
and words it does not know it often misspells.

Licence: Apache-2.0, like the rest of the repository.
"""

Example = tuple[list[int], list[int]]
"""Token ids, and what is to be learnt at each position: the id itself or `IGNORED`."""


def train_tokenizer(vocab_size: int, rng: Random) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a chat template, trained on stories."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(rng), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer_texts(rng: Random) -> Iterator[str]:
    """Yield texts of stories and chats."""
    for _ in range(6000):
        yield from (turn["content"] for turn in tell_chat(rng))
        yield tell(rng).text


def encode_story(tokenizer: PreTrainedTokenizerFast, text: str) -> Example:
    """Return a whole story: all of it is to be learnt."""
    ids = [BOS, *tokenizer.encode(text, add_special_tokens=False), EOS]
    return ids, ids


def encode_chat(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> Example:
    """Return a conversation as the chat template writes it; only the answers are to be learnt."""
    ids, labels = [BOS], [IGNORED]
    for turn in turns:
        role = SPECIAL_TOKENS.index(f"<|{turn['role']}|>")
        content = tokenizer.encode(turn["content"], add_special_tokens=False)
        is_answer = turn["role"] == "assistant"
        content += [EOS] if is_answer else []
        ids += [role, *content]
        labels += [IGNORED, *(content if is_answer else [IGNORED] * len(content))]
    return ids, labels


def draw_example(tokenizer: PreTrainedTokenizerFast, rng: Random, context: int) -> Example:
    """Return a new story or conversation of at most `context` tokens."""
    if rng.random() < 0.5:
        ids, labels = encode_chat(tokenizer, tell_chat(rng))
    else:
        ids, labels = encode_story(tokenizer, tell(rng).text)
    return ids[:context], labels[:context]


def make_batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, tokens: int, context: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels, each [examples, length], of about `tokens` tokens, without end.

    Examples of like length share a batch; no example is seen twice.
    """
    while True:
        pool = sorted(
            (draw_example(tokenizer, rng, context) for _ in range(1024)), key=lambda e: len(e[0])
        )
        batches: list[list[Example]] = [[]]
        for example in pool:
            if (len(batches[-1]) + 1) * len(example[0]) > tokens:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        yield from map(_pad, batches)


def make_drills(
    vocab_size: int, rng: Random, tokens: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `count` batches of random tokens that repeat three times, like `make_batches`.

    From them the model learns within a hundred steps to copy from its context. Stories alone teach
    that late, and until then names and things change from one sentence to the next.
    """
    for _ in range(count):
        length = rng.randrange(4, 20)
        rows = []
        for _ in range(tokens // (3 * length)):
            ids = [rng.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(length)]
            rows.append(([BOS, *ids * 3], [IGNORED] * (length + 1) + ids * 2))
        yield _pad(rows)


def _pad(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Return the examples as two matrices, padded on the right."""
    length = max(len(ids) for ids, _ in examples)
    ids = [row + [PAD] * (length - len(row)) for row, _ in examples]
    labels = [row + [IGNORED] * (length - len(row)) for _, row in examples]
    return torch.tensor(ids), torch.tensor(labels)


def make_model(vocab_size: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """Return an untrained model."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], args: argparse.Namespace
) -> int:
    """Train `model` in place, print progress, return the number of steps."""
    optimizers = make_optimizers(model, args.rate)
    started, tokens, mean = time.monotonic(), 0, math.nan
    for step, (ids, labels) in enumerate(batches):
        elapsed = time.monotonic() - started
        done = elapsed / (60 * args.minutes) if args.minutes else step / args.steps
        if done >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * min((step + 1) / 40, (1 - done) / 0.5, 1)
        loss = train_step(model, optimizers, ids, labels)
        tokens += ids.numel()
        mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
        if step % 50 == 0:
            print(f"step {step:5d}  loss {mean:.3f}  {tokens:9,d} tokens  {elapsed:4.0f} s")
    return step


def train_step(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], ids: Tensor, labels: Tensor
) -> float:
    """Change the weights once and return the loss in nats per token."""
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 200
) -> float:
    """Return the loss in nats per token over plain stories of a random stream of its own."""
    rng = Random(f"held out {seed}")
    total, tokens = 0.0, 0
    for _ in range(count):
        ids, labels = _pad([encode_story(tokenizer, tell(rng).text)])
        total += float(model(input_ids=ids, labels=labels).loss) * (ids.numel() - 1)
        tokens += ids.numel() - 1
    return total / tokens


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, seed: int, steps: int
) -> None:
    """Write the checkpoint, in bfloat16, and its model card; print the loss of what was written."""
    output.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(tokenizer, output)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=0.6,
        top_k=0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model.to(torch.bfloat16).save_pretrained(output)  # type: ignore[arg-type]
    (output / "model.safetensors").chmod(0o644)
    loss = held_out_loss(model.to(torch.float32), tokenizer, seed)  # type: ignore[arg-type]
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        seed=seed,
        steps=steps,
        loss=loss,
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    print(f"held-out loss {loss:.4f}\n{json.dumps(sizes, indent=1)}\ntotal {sum(sizes.values()):,}")


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the tokenizer under the class name that older readers know too."""
    tokenizer.save_pretrained(output, save_jinja_files=False)
    path = output / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def show_samples(folder: Path) -> None:
    """Print what the saved checkpoint makes of some prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["Once upon a time", "One day, a little fox", "Lily had a", "The old robot"]
    questions = ("Tell me a story about a dragon.", "Write about Mia and a red ball.", "Hello!")
    texts += [f"<|user|>{question}<|assistant|>" for question in questions]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    for temperature in (None, 0.7):
        torch.manual_seed(0)
        for prompt in prompts:
            sampling = {"do_sample": temperature is not None, "temperature": temperature}
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=256, **sampling)[0]
            print(f"--- temperature {temperature or 0}, {len(ids) - len(prompt)} tokens")
            print(tokenizer.decode(ids))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "distributed_llm" / "builtin_model")
    parser.add_argument("--steps", type=int, default=1900, help="batches to train on")
    parser.add_argument("--drills", type=int, default=150, help="first batches: drills in copying")
    parser.add_argument("--minutes", type=float, help="train this long instead; does not repeat")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="longest text, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=6e-3, help="highest learning rate")
    return parser.parse_args()


def main() -> None:
    """Train, save, and show what came out."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    tokenizer = train_tokenizer(args.vocab_size, rng)
    model = make_model(len(tokenizer), args)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    started = time.monotonic()
    drills = make_drills(len(tokenizer), rng, args.batch_tokens, args.drills)
    batches = chain(drills, make_batches(tokenizer, rng, args.batch_tokens, args.context))
    steps = train(model, batches, args)
    print(f"{steps} steps in {time.monotonic() - started:.0f} s")
    save(model, tokenizer, args.output, args.seed, steps)
    show_samples(args.output)


if __name__ == "__main__":
    main()
