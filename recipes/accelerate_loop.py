"""Fine-tune in a loop of your own under Accelerate, on one process or several.

    torchrun --nproc_per_node 2 recipes/accelerate_loop.py --out runs/accelerate
    accelerate launch recipes/accelerate_loop.py --model MODEL --data TEXT --steps 1000    # GPUs

The density term is a few lines: make it, watch the forward, add it, and keep the maps of its exits
beside the weights; the rest is as it was.
Accelerate averages gradients over processes and divides by the accumulated batches, the term's with
the task's. The draws differ by process and by accumulated batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import softtrace
from softtrace.data import pack, read_documents, split_by_file
from softtrace.model.loading import load_model, load_tokenizer

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(HERE / "models" / "pystdlib-4m"))
    parser.add_argument("--data", default=str(Path(matplotlib.__file__).parent))
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="of a process")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--strength", type=float, default=0.35)
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    tokenizer = load_tokenizer(args.model)
    documents, _ = split_by_file(read_documents(args.data), 0.1)
    blocks = pack(documents, tokenizer, args.block_size)
    bare = load_model(args.model).train()
    density_loss = softtrace.DensityLoss(bare, strength=args.strength)  # before it is wrapped
    optimizer = torch.optim.AdamW(bare.parameters(), args.lr, weight_decay=0.1)
    loader = torch.utils.data.DataLoader(blocks, args.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(bare, optimizer, loader)

    step = micro_step = 0
    while step < args.steps:
        for ids in loader:
            with accelerator.accumulate(model):
                with density_loss.watching(model, step, {"input_ids": ids}) as watched:
                    task = model(input_ids=ids, labels=ids).loss
                term = density_loss(ids, step=step, micro_step=micro_step, watched=watched)
                accelerator.backward(task + term.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            micro_step += 1
            if accelerator.sync_gradients:
                if step % 10 == 0:
                    accelerator.print(f"step {step}  task {task:.3f}  density {term.loss:.3f}")
                step, micro_step = step + 1, 0
            if step == args.steps:
                break
    density_loss.finish()
    weights = accelerator.get_state_dict(model)  # in all processes, which may each have a part
    accelerator.wait_for_everyone()  # none ends while another waits for its part
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out, state_dict=weights)
        softtrace.save_exit_maps(bare, args.out)
        tokenizer.save_pretrained(args.out)
    accelerator.print(f"written to {args.out}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
