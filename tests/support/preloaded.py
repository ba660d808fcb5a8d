"""What processes of tests import, to be imported once: see :mod:`tests.support.warm`.

Nothing but imports, and a table that transformers makes when it first loads a model: whatever ran
here would have run in every one of those processes. (And what was imported is kept from the
collector, which would go through all of it in each.)
"""

from __future__ import annotations

import gc
import importlib

for _name in (
    *("lightning.pytorch.cli", "lightning.pytorch.strategies.launchers.subprocess_script"),
    *("matplotlib.pyplot", "peft", "torch.distributed.fsdp", "transformers.generation"),
    # what softtrace.cli imports only when a command runs
    *(
        f"softtrace.{name}"
        for name in (
            *("cli", "cli.fit", "hf", "lightning", "decoding", "metrics", "cli.evaluate"),
            *("cli.compare", "cli.decode_bench", "report.html_page"),
            "cli.study",
        )
    ),
):
    importlib.import_module(_name)

# Lazy: each is in a module that is not there until it is asked for.
from transformers import (  # noqa: E402, F401
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    conversion_mapping,
)

# A thousand regular expressions, whatever is loaded.
conversion_mapping.get_checkpoint_conversion_mapping("llama")

gc.collect()
gc.freeze()
