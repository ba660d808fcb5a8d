"""The card of a model that ``pretrain.py`` trained, from the facts of the run."""

from __future__ import annotations

from typing import Any


def card(facts: dict[str, Any]) -> str:
    """The model card."""
    train, held_out = facts["train"], facts["held_out"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [code, python, softtrace]
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
---
# {facts["name"]}

A Llama of {facts["parameters"]:,} parameters ({facts["layers"]} layers of width
{facts["hidden_size"]}, {facts["heads"]} heads, {facts["kv_heads"]} key/value heads, tied
embeddings, byte-level BPE with {facts["vocabulary"]} tokens) for trying softtrace out and for its
tests. It predicts Python source a little, and is not good for anything else.

- **Held-out loss: {facts["held_out_nats_per_token"]:.4f} nats/token**,
  {facts["held_out_bits_per_byte"]:.4f} bits/byte, of the saved bfloat16 weights run in float32
- Training data: {facts["data"]}: {train["documents"]:,} files, {train["bytes"]:,} bytes,
  {train["tokens"]:,} tokens
- Held-out data: {held_out["documents"]:,} files, {held_out["bytes"]:,} bytes,
  {held_out["tokens"]:,} tokens
- Training: {facts["steps"]:,} steps of {facts["batch_size"]} x {facts["block_size"]} tokens
  ({facts["epochs"]} epochs), {facts["training_seconds"]} s on {facts["hardware"]}
- Context: {facts["context"]} positions, of which training used the first {facts["block_size"]}

## Data and licence

The text is the source code that comes with the Python interpreter, without installed packages. It
is copyright of the Python Software Foundation and other contributors, under the
[PSF License Version 2](https://docs.python.org/3/license.html); some modules carry notices of their
own, listed there. The weights and the tokenizer are derived from that text, and can repeat pieces
of it word for word: treat them under the same terms. softtrace's own licence covers the recipe.

## What was held out

A file is held out when the first 8 bytes of `sha256("{facts["held_out_salt"]}" + relative path)`,
as a fraction of 2^64, are below {facts["held_out_share"]} (`softtrace.data.split_by_file`);
`held_out_files.txt` lists them. The tokenizer was trained without them too. The loss is the mean
over blocks of {facts["block_size"]} tokens, the first token of a block not counted; bits/byte
divide it by the held-out bytes a token. The kept weights are those of the best held-out loss among
{len(facts["history"])} evaluations (step {facts["kept_step"]}). That flatters the number slightly,
as do passages that held-out and training files share (encodings tables, test boilerplate).

## How to get it again

    {facts["command"]}

run by Python {facts["versions"]["python"]} on {facts["data"]}. Results vary a little
with the hardware and, under `--max-seconds`, with its speed. All facts of the run are in
`pretrain.json`.
"""
