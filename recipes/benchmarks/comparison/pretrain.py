"""Train the small Llama that ships with softtrace on the source of Python's standard library.

    python -m recipes.benchmarks.comparison.pretrain --device cuda --compile --max-seconds 360

A larger one, on other source code, for comparisons at a size that fine-tuners use:

    python -m recipes.benchmarks.comparison.pretrain --data SITE_PACKAGES --output MODEL \\
        --layers 12 --hidden-size 768 --heads 12 --kv-heads 4 --vocabulary 16384 --lr 1e-3 \\
        --weight-decay 0.1 --device cuda

Everything comes from the interpreter that runs it: the text is its standard library, the tokenizer
is trained on the training files, and the model is a causal Llama of about 4 M parameters. Files are
held out by the hash of their names (``softtrace.data.split_by_file``), so that they can be told
apart again, and ``held_out_files.txt`` lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from recipes.benchmarks.comparison.pretrained_card import card
from recipes.benchmarks.places import MODEL
from softtrace.data import pack, read_documents, split_by_file
from softtrace.data.documents import Document
from softtrace.data.encoding import encode
from softtrace.errors import OutputExistsError
from softtrace.files import atomic_path, write_json

END = "<|endoftext|>"
HELD_OUT_SHARE = 0.05
SALT = "pystdlib"
CONTEXT = 512
# Third-party code and bundled tests in other encodings; the latter would be skipped anyway.
EXCLUDE = ("site-packages", "dist-packages", "lib2to3/tests/data")


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> FastTokenizer:
    """A byte-level BPE tokenizer of so many tokens, trained on these documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return FastTokenizer(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def build_model(vocabulary: int, end: int, options: argparse.Namespace) -> LlamaForCausalLM:
    """A freshly initialised Llama in float32; 8 layers of width 192 unless told otherwise."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden_size,
        # Two thirds of four widths, a multiple of 64: the gate makes it three matrices, not two.
        intermediate_size=64 * round(options.hidden_size * 8 / 3 / 64),
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,  # a padding index would keep the end token's embedding from training
    )
    return LlamaForCausalLM(config)


def causal_loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of tokens ``[B, T + 1]``, each but the first from those before it.

    The same function as ``model(...).loss``, run layer by layer: inside ``torch.compile`` the
    model's own forward builds an explicit causal mask, which keeps attention off its fast kernels.
    """
    inner = model.model
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden = inner.embed_tokens(inputs)
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    rotary = inner.rotary_emb(hidden, positions)
    for layer in inner.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    logits = model.lm_head(inner.norm(hidden))
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def check_causal_loss(model: LlamaForCausalLM, tokens: Tensor) -> None:
    """Stop unless :func:`causal_loss` equals the model's own forward in this transformers."""
    with torch.no_grad():
        ours = causal_loss(model, tokens)
        logits = model(input_ids=tokens[:, :-1]).logits
        theirs = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    if not torch.allclose(ours, theirs, rtol=1e-4):
        raise RuntimeError(
            f"the layer-by-layer loss is {ours:.6f}, the model's own {theirs:.6f}: this version of "
            f"transformers ({transformers.__version__}) runs its layers differently."
        )


def batches(stream: Tensor, batch_size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless random crops ``[batch_size, length + 1]`` of ``stream``, cut on the stream's device.

    An epoch shifts the grid of blocks by a random offset and visits the blocks in random order:
    every token is seen once an epoch (but for the edges), with other neighbours every time.
    """
    generator = torch.Generator(stream.device).manual_seed(seed)
    reach = torch.arange(length + 1, device=stream.device)
    count = (len(stream) - 1) // length - 1  # one less, to leave room for the shift
    if count < 1:
        raise SystemExit(f"{len(stream)} training tokens are too few for blocks of {length}")
    order = torch.empty(0, dtype=torch.int64, device=stream.device)
    while True:
        while len(order) < batch_size:
            shift = torch.randint(0, length, (1,), generator=generator, device=stream.device)
            grid = torch.randperm(count, generator=generator, device=stream.device)
            order = torch.cat([order, shift + length * grid])
        yield stream[order[:batch_size, None] + reach]
        order = order[batch_size:]


def held_out_loss(model: LlamaForCausalLM, blocks: Tensor, autocast: Callable[[], Any]) -> float:
    """Mean loss in nats a token over blocks ``[N, T]``, the first token of a block not counted."""
    total = torch.zeros((), dtype=torch.float64, device=blocks.device)
    with torch.no_grad(), autocast():
        for part in blocks.split(64):
            total += causal_loss(model, part).double() * len(part)
    return total.item() / len(blocks)


def train(
    model: LlamaForCausalLM, stream: Tensor, blocks: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Train in place and leave the weights of the best held-out loss in the model.

    Args:
        model: float32, on the device of the data.
        stream: ``[tokens]`` int64, the training tokens in a row.
        blocks: ``[N, T]`` int64, the held-out blocks.
        options: as parsed by :func:`parse`; ``started`` is when the process began, in seconds.

    Returns:
        What is worth keeping of the run: steps, seconds, the history of held-out losses.
    """
    device = stream.device
    on_gpu = device.type == "cuda"

    def autocast() -> Any:
        # bfloat16 is slower than float32 on most CPUs
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()

    loss_of: Callable[..., Tensor] = causal_loss
    if options.compile:
        loss_of = torch.compile(causal_loss, mode=options.compile, dynamic=False)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},  # norms' scales
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=on_gpu)
    source = batches(stream, options.batch_size, options.block_size, options.seed)
    with autocast():  # compile and set up kernels before the schedule's clock starts
        loss_of(model, next(source)).backward()
    optimizer.zero_grad()
    running = torch.zeros((), device=device)
    history: list[dict[str, float]] = []
    best, best_step, kept = math.inf, 0, {}
    begun, step, logged = time.perf_counter(), 0, 0
    deadline = options.started + options.max_seconds
    if deadline <= begun:
        raise SystemExit("--max-seconds ran out before training began; give more")
    bar = tqdm(total=options.steps, desc="pretraining", unit="step")
    while True:
        elapsed = time.perf_counter() - begun
        progress = max(step / options.steps, elapsed / (deadline - begun))
        if step == options.steps or progress >= 1 or step % options.eval_every == 0 < step:
            mean = running.item() / max(step - logged, 1)  # waits for the device
            running.zero_()
            logged = step
            if not math.isfinite(mean):
                raise SystemExit(f"the loss is {mean} by step {step}; give a smaller --lr")
            loss = held_out_loss(model, blocks, autocast)
            seconds = time.perf_counter() - begun
            rate = step * options.batch_size * options.block_size / seconds
            history.append({"step": step, "train": round(mean, 4), "held_out": round(loss, 4)})
            bar.write(
                f"step {step:6d}  {seconds:6.0f} s  {rate:9.0f} tokens/s  learning rate "
                f"{optimizer.param_groups[0]['lr']:.1e}  train {mean:.4f}  held-out {loss:.4f}"
            )
            if loss < best:
                best, best_step = loss, step
                kept = {name: value.clone() for name, value in model.state_dict().items()}
            if step == options.steps or progress >= 1:
                bar.close()
                break
        warm = min(1.0, (step + 1) / options.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
        with autocast():
            loss_now = loss_of(model, next(source))
        loss_now.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss_now.detach()
        bar.update()
        step += 1
    model.load_state_dict(kept)
    return {
        "steps": step,
        "kept_step": best_step,
        "training_seconds": round(time.perf_counter() - begun, 1),
        "epochs": round(step * options.batch_size * options.block_size / len(stream), 2),
        "history": history,
    }


def save(
    model: LlamaForCausalLM, tokenizer: FastTokenizer, held_out: Sequence[Document], output: Path
) -> LlamaForCausalLM:
    """Write model (bfloat16), tokenizer and file list; return the model reloaded in float32."""
    output.mkdir(parents=True, exist_ok=True)
    device = model.device
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    names = "".join(f"{document.name}\n" for document in held_out)
    (output / "held_out_files.txt").write_text(names, encoding="utf-8")
    reloaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    return reloaded.to(device)


def counts(documents: Sequence[Document], tokens: int) -> dict[str, int]:
    """Counts of one side of the split; bytes are those of the UTF-8 text."""
    size = sum(len(document.text.encode()) for document in documents)
    return {"documents": len(documents), "bytes": size, "tokens": tokens}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of Python source (default: this Python's library)")
    add("--exclude", nargs="+", default=[], help="globs of files or folders to leave out")
    add("--output", type=Path, default=MODEL)
    add("--overwrite", action="store_true", help="write into an output folder that holds files")
    add("--steps", type=int, default=8000)
    add("--max-seconds", type=float, default=math.inf, help="end training by then, fully decayed")
    add("--batch-size", type=int, default=64)
    add("--block-size", type=int, default=256)
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--warmup-steps", type=int, default=300)
    add("--weight-decay", type=float, default=1.0)
    add("--eval-every", type=int, default=500)
    add("--eval-blocks", type=int, default=2048, help="held-out blocks used while training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--compile", nargs="?", const="default", help="torch.compile, with this mode if given")
    add("--layers", type=int, default=8)
    add("--hidden-size", type=int, default=192)
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--vocabulary", type=int, default=4096)
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ("layers", "hidden_size", "heads", "kv_heads", "vocabulary")
    for name in ("steps", "batch_size", "warmup_steps", "eval_every", "eval_blocks", *sizes):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.hidden_size % options.heads or options.heads % options.kv_heads:
        parser.error("--hidden-size must be a multiple of --heads, and that of --kv-heads")
    if not 2 <= options.block_size <= CONTEXT:
        parser.error(f"--block-size must lie between 2 and the model's context, {CONTEXT}")
    if not options.overwrite and options.output.is_dir() and any(options.output.iterdir()):
        raise OutputExistsError(f"{options.output} holds files; give --overwrite or --output")
    options.started = time.perf_counter()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, train, save, and measure what was saved."""
    options = parse(arguments)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    transformers.utils.logging.disable_progress_bar()
    data = options.data or Path(sysconfig.get_paths()["stdlib"])
    train_documents, held_out_documents = split_by_file(
        read_documents(data, (".py",), (*EXCLUDE, *options.exclude)), HELD_OUT_SHARE, SALT
    )
    tokenizer = train_tokenizer(train_documents, options.vocabulary)
    stream = encode(train_documents, tokenizer).to(device)
    blocks = pack(held_out_documents, tokenizer, options.block_size).to(device)
    model = build_model(len(tokenizer), tokenizer.eos_token_id, options).to(device)
    check_causal_loss(model, blocks[:4])
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(stream):,} training tokens in {len(train_documents)} "
        f"files, {blocks.numel():,} held-out tokens in {len(held_out_documents)} files; "
        f"prepared in {time.perf_counter() - options.started:.0f} s",
        flush=True,
    )
    # A fixed sample spread over all held-out files; the final loss is over all blocks.
    spread = torch.linspace(0, len(blocks) - 1, min(options.eval_blocks, len(blocks))).long()
    facts = train(model, stream, blocks[spread.to(device)], options)
    reloaded = save(model, tokenizer, held_out_documents, options.output)
    loss = held_out_loss(reloaded, blocks, contextlib.nullcontext)
    held_out = counts(held_out_documents, len(encode(held_out_documents, tokenizer)))
    bits = loss / math.log(2) * held_out["tokens"] / held_out["bytes"]
    on_gpu = device.type == "cuda"
    flags = " ".join(
        f"--{name.replace('_', '-')} "
        + (" ".join(value) if isinstance(value, list) else str(getattr(value, "name", value)))
        for name, value in vars(options).items()
        if name not in ("output", "overwrite", "started") and value not in (None, math.inf, [])
    )
    facts |= {
        "name": options.output.name,
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        **{name: getattr(options, name) for name in ("layers", "hidden_size", "heads", "kv_heads")},
        "context": CONTEXT,
        # The folder's name only: where it lay says nothing to anyone else.
        "data": data.name if options.data else f"the library of Python {platform.python_version()}",
        "train": counts(train_documents, len(stream)),
        "held_out": held_out,
        "held_out_share": HELD_OUT_SHARE,
        "held_out_salt": SALT,
        "held_out_rule": f"sha256({SALT!r} + name)[:8] / 2**64 < {HELD_OUT_SHARE}",
        "held_out_nats_per_token": round(loss, 5),
        "held_out_bits_per_byte": round(bits, 5),
        "batch_size": options.batch_size,
        "block_size": options.block_size,
        "command": f"python -m recipes.benchmarks.comparison.pretrain {flags}",
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "precision": "bfloat16 autocast" if on_gpu else "float32",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    with atomic_path(options.output / "README.md") as path:
        path.write_text(card(facts), encoding="utf-8")
    write_json(options.output / "pretrain.json", facts)  # last: a folder that has it is whole
    print(f"held-out loss of the saved weights: {loss:.4f} nats/token, {bits:.4f} bits/byte")


if __name__ == "__main__":
    main()
