"""Fine-tune with transformers' own Trainer and the density term.

    python recipes/hf_trainer.py --out runs/hf-trainer
    python recipes/hf_trainer.py --model MODEL --data TEXT --out RUN --steps 1000 --bf16

Any Trainer will do: ``with_density(SFTTrainer)`` is TRL's. ``OUT`` gets model and tokenizer, which
``softtrace evaluate --model OUT`` reads; an interrupted run resumes with ``--resume``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from transformers import Trainer, TrainingArguments

from softtrace.data import pack, read_documents, split_by_file
from softtrace.hf import with_density
from softtrace.model.loading import load_model, load_tokenizer

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(HERE / "models" / "pystdlib-4m"))
    parser.add_argument("--data", default=str(Path(matplotlib.__file__).parent))
    parser.add_argument("--out", default="runs/hf-trainer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--strength", type=float, default=0.35)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", action="store_true", help="resume from OUT's last checkpoint")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    documents, _ = split_by_file(read_documents(args.data), 0.1)
    blocks = pack(documents, tokenizer, args.block_size)
    trainer = with_density(Trainer)(
        model=load_model(args.model),
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            bf16=args.bf16,
            logging_steps=5,
            save_steps=max(1, args.steps // 2),
            report_to=[],
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        density={"strength": args.strength},
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"written to {args.out}; next: softtrace evaluate --model {args.out} --data {args.data} "
        f"--out {args.out}/density --held_out_share 0.1"
    )


if __name__ == "__main__":
    main()
