"""The table of engines, walked row by row: what is supported is tested elsewhere, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import softtrace
from recipes.benchmarks.places import RESULTS
from softtrace.errors import UnsupportedModelError
from softtrace.model.engines import ENGINES, engine, engine_around
from tests.support.tiny import tiny_model
from tests.support.ways_to_shard import one_process_group

TESTS = Path(__file__).resolve().parents[1]

#: supported row -> the file that compares it with one process
SUPPORTED = {
    "one process": "loss/test_density_loss.py",
    "DDP": "parity/test_parity.py",
    "FSDP2": "loss/test_together.py",
    "FSDP1": "loss/test_together.py",
    "offloading by Accelerate": "model/test_devices.py",
    "DeepSpeed ZeRO 1 and 2": "loss/test_zero.py",
    "DeepSpeed ZeRO 3": "loss/test_zero.py",
    "device_map": "model/test_several_devices.py",
}
#: supported row that splits weights -> the file that measures it
MEASURING = {
    "FSDP2": "evaluation/test_sharded.py",
    "FSDP1": "evaluation/test_sharded.py",
    "DeepSpeed ZeRO 3": "lightning/test_deepspeed.py",
}
#: supported row that splits a model -> what its rows of the exactness table begin with
MEASURED = {
    "FSDP2": ("FSDP2",),
    "FSDP1": ("FSDP1",),
    "DeepSpeed ZeRO 1 and 2": ("ZeRO 1", "ZeRO 2"),
    "DeepSpeed ZeRO 3": ("ZeRO 3",),
}
#: refused by the integrations, where they can be seen
BY_TRAINERS = {"CP", "SP", "TP"}


def flat(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)


def leaves(model: Any) -> Any:
    model.model.layers[1].mlp._z3_leaf = True
    return model


def split(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    part = distribute_tensor(
        model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]
    )
    model.lm_head.weight = nn.Parameter(part)
    return model


def copied(model: Any) -> Any:
    model.model.layers[0].around = nn.DataParallel(nn.Linear(1, 1))
    return model


MADE: dict[str, Callable[[Any], Any]] = {
    "FSDP1 without use_orig_params": flat, "TP": split, "DataParallel": copied,
    "DeepSpeed ZeRO 3 with leaf modules": leaves,
}  # fmt: skip


def test_every_row_is_walked() -> None:
    names = [each.name for each in ENGINES]
    assert len(set(names)) == len(names)
    assert {each.name for each in ENGINES if each.refused is None} == set(SUPPORTED)
    refused = {each.name for each in ENGINES if each.refused}
    assert refused == set(MADE) | BY_TRAINERS
    assert MEASURING.keys() == {
        each.name for each in ENGINES if "measure together" in (each.note or "")
    }
    for file in (*SUPPORTED.values(), *MEASURING.values()):
        assert (TESTS / file).is_file(), file


def test_what_splits_a_model_was_measured() -> None:
    found = json.loads((RESULTS / "exactness.json").read_text(encoding="utf-8"))
    for name, rows in MEASURED.items():
        assert engine(name).refused is None
        for row in rows:
            gaps = {
                each: gap for each, gap in found["sharded"].items() if each.startswith(f"{row}, ")
            }
            assert len(gaps) == 6  # losses, gradients, weights; on two processes and on three
            for each, gap in gaps.items():  # ZeRO's are float32's
                float32 = 1e-4 if "gradients" in each else 1e-5
                assert gap < (1e-12 if row.startswith("FSDP") else float32), each
            assert found["resumed"][row]["largest"] == 0
    deepspeed = "DeepSpeedStrategy", "DeepSpeedStrategy(stage=3)"
    for strategy in ("ModelParallelStrategy", "FSDPStrategy", *deepspeed):
        way = found["inert"][strategy]
        assert way["strength 0"] == 0 < way["strength 0.6"]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("name", MADE)
def test_what_is_refused_is_named(name: str) -> None:
    message = f"found {name} .*allowed are one process"
    with one_process_group():
        model = MADE[name](tiny_model("llama"))
        assert engine_around(model) is engine(name)
        with pytest.raises(UnsupportedModelError, match=message):
            softtrace.attach(model)
        inside = tiny_model("llama")
        softtrace.attach(inside)
        later = MADE[name](inside)
        with pytest.raises(UnsupportedModelError, match=message):
            softtrace.attach(later)
    assert engine_around(tiny_model("llama")) is None


def test_a_plan_of_transformers_that_split_matrices_is_refused(tmp_path: Path) -> None:
    """The plan of a Llama, as the first of two processes loads it; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        tiny_model("llama").save_pretrained(tmp_path)
        split_by = DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=split_by)
        assert model.model.layers[0].mlp.up_proj.weight.to_local().shape[0] == 48 // 2
        assert engine_around(model) is engine("TP")
        with pytest.raises(UnsupportedModelError, match=r"found TP \(tensor parallelism.* splits"):
            softtrace.attach(model)
    finally:
        torch.distributed.destroy_process_group()
