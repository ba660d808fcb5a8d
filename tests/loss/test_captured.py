"""What a CUDA graph of masked runs rests on, where there is no CUDA: other weights, its key."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from softtrace import DensityLoss
from softtrace.errors import NonFiniteError
from softtrace.graph.batch import Batch
from softtrace.loss.captured import _copy, _tensors, term_and_gradients
from softtrace.loss.cuda_graphs import key_of, with_weights
from softtrace.loss.fused import Tensors
from softtrace.loss.masked_term import masked_term
from softtrace.loss.windows import draw_windows
from softtrace.model.state import dropout_off
from softtrace.tracing.attach import attach
from tests.support import zoo
from tests.support.cuda_waits import refusing_to_wait
from tests.support.skips import cuda
from tests.support.tiny import tiny_prompt


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradients_at_shared_weights_are_those_of_the_model(family: str, frozen: bool) -> None:
    model = zoo.tiny(family)
    if frozen:  # as adapters leave the rest of a model
        for number, each in enumerate(model.parameters()):
            each.requires_grad_(number % 2 == 0)
    own = {name: each for name, each in model.named_parameters() if each.requires_grad}
    shared = {name: each.detach().requires_grad_() for name, each in own.items()}
    penalty = DensityLoss(model, share=1.0)
    options = penalty.options.on(torch.device("cpu"))
    windows = draw_windows(attach(model), Batch.of(tiny_prompt(9, batch=3)), (0, 0), options)
    assert windows is not None

    def run() -> torch.Tensor:
        found = masked_term(attach(model), windows, options, static=True)
        assert found is not None
        return found.term

    with dropout_off(model):
        wanted = torch.autograd.grad(run(), list(own.values()), allow_unused=True)
        term = with_weights(model, shared, run)
        found = torch.autograd.grad(term, list(shared.values()), allow_unused=True)
    assert all(model.get_parameter(name) is each for name, each in own.items())
    for one, other in zip(wanted, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)
    assert sum(each is not None for each in found) > len(found) / 2


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "layers", "changes", "backend"),
    [  # how layers follow each other is seen in one; tracing takes as long as there are layers
        ("llama", 2, {}, "aot_eager"),
        ("gpt2", 1, {"masks": "soft", "attention": "recomputed"}, "eager"),
        ("gemma3_text", 1, {"size_weight": 0.1}, "eager"),
    ],
)
def test_fused_runs_are_those_of_the_weights_and_windows_at_the_call(
    family: str, layers: int, changes: dict[str, Any], backend: str
) -> None:
    model = zoo.tiny(family, num_hidden_layers=layers)
    next(model.parameters()).requires_grad_(False)
    penalty = DensityLoss(model, share=1.0, exits=0.0, **changes)
    options = penalty.options.on(torch.device("cpu"))
    first, second = (
        draw_windows(
            attach(model), Batch.of(tiny_prompt(9, batch=3, seed=seed)), (seed, 0), options
        )
        for seed in (0, 1)
    )
    assert first is not None
    assert second is not None
    own = _copy(first)
    with torch.autocast("cpu", torch.bfloat16):
        fused = term_and_gradients(attach(model), own, replace(options, fuse=True), backend)
        as_it_is = term_and_gradients(attach(model), own, replace(options, fuse=False))

    def check() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            expected = as_it_is()
        into = apart(expected)
        assert fused(into) is into
        for found in (fused(), into):
            for one, other in zip(found, expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3)

    check()
    before = fused()[0]
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(1.1)
    check()
    for place, new in zip(_tensors(own), _tensors(second), strict=True):
        place.copy_(new)
    check()
    assert fused()[0] != before


def apart(found: Tensors) -> list[torch.Tensor | None]:
    """Memory for such tensors, in which something else is written."""
    return [each if each is None else torch.full_like(each, 7) for each in found]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's head is its embedding
def test_gradients_are_written_where_they_are_to_lie(family: str) -> None:
    model = zoo.tiny(family)
    next(model.parameters()).requires_grad_(family != "llama")
    penalty = DensityLoss(model, share=1.0, exits=0.0)
    options = replace(penalty.options.on(torch.device("cpu")), fuse=False)
    windows = draw_windows(attach(model), Batch.of(tiny_prompt(9, batch=3)), (0, 0), options)
    assert windows is not None
    run = term_and_gradients(attach(model), windows, options)
    wanted = run()
    into = apart(wanted)
    for _ in range(2):
        given = run(into)
        assert all(one is other for one, other in zip(given[5:], into[5:], strict=True))
        for one, other in zip(given, wanted, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert sum(each is not None for each in into[5:]) > len(into) / 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's head is its embedding
def test_what_is_not_finite_gives_a_term_and_gradients_of_zero(family: str) -> None:
    model = zoo.tiny(family)
    penalty = DensityLoss(model, share=1.0, exits=0.0, on_nonfinite="skip")
    options = replace(penalty.options.on(torch.device("cpu")), fuse=False)
    windows = draw_windows(attach(model), Batch.of(tiny_prompt(9, batch=3)), (0, 0), options)
    assert windows is not None
    run = term_and_gradients(attach(model), windows, options)
    term, _, _, _, finite, *gradients = run()
    assert finite
    assert term > 0
    assert any(each is not None and each.any() for each in gradients)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = torch.nan
    term, _, _, _, finite, *broken = run([*5 * [None], *apart(gradients)])
    assert not finite
    assert term == 0
    for one, other in zip(broken, gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or not one.any()


def test_a_graph_is_of_its_shapes_its_weights_and_what_they_do() -> None:
    model = zoo.tiny("llama")
    instrument = attach(model)
    options = DensityLoss(model, share=1.0, crop=4).options

    def key(rows: int = 3, **changes: Any) -> object:
        return key_of(instrument, replace(options, **changes), (rows, 9))

    first = key()
    assert first == key(strength=0.1, every=4, warmup_steps=3)  # only what runs compute matters
    assert hash(first) == hash(key())
    with torch.no_grad():
        next(model.parameters()).add_(1)  # an optimiser's step, in place
    assert first == key()
    assert first not in (key(rows=2), key(thresholds=(0.1, 0.2)), key(exits=0.0))
    frozen = next(model.parameters()).requires_grad_(False)
    assert first != key()
    frozen.requires_grad_(True)
    assert first == key()
    with torch.autocast("cpu"):
        assert first == key()  # a graph is CUDA's, and so is its autocast
    table = model.model.rotary_emb.inv_freq
    model.model.rotary_emb.inv_freq = table.clone()  # a table that has grown
    assert first != key()
    model.model.rotary_emb.inv_freq = table
    assert first == key()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data)  # the same memory
    assert first != key()


@pytest.mark.thorough
def test_a_graph_is_of_its_adapters_and_their_scale() -> None:
    model = zoo.tiny("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    instrument, options = attach(model), DensityLoss(model, exits=0.0).options
    layer = model.model.layers[0].self_attn.o_proj
    first = key_of(instrument, options)
    layer.set_scale("default", 3.0)
    scaled = key_of(instrument, options)
    layer.enable_adapters(False)
    assert len({first, scaled, key_of(instrument, options)}) == 3


def on_cuda() -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """A model, and batches of one shape."""
    batches = [tiny_prompt(32, seed=seed, batch=4).cuda() for seed in range(6)]
    return zoo.tiny("llama").cuda(), batches


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    read = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in read]


@cuda
# of the compiler; the second where the test is the first of its process to compile
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fuse", [False, True])
def test_a_replay_equals_a_run_also_after_the_weights_have_moved(
    fuse: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = on_cuda()
    options: dict[str, Any] = {"share": 1.0, "crop": 16, "every": 1, "exits": 0.0}
    captured = DensityLoss(model, **options, fuse=fuse)
    plain = DensityLoss(model, **options, cuda_graph=False)
    for step, ids in enumerate(batches):
        one, other = captured(ids, step=step), plain(ids, step=step)
        torch.testing.assert_close(one.loss, other.loss)
        for a, b in zip(gradients(model, one.loss), gradients(model, other.loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for each in model.parameters():
                each.mul_(1.05)
    assert len(captured._captured.graphs.known) == 1
    assert next(iter(captured._captured.graphs.known.values())).number == len(batches) - 2
    assert "cannot be compiled" not in caplog.text  # nor captured as it is instead


@cuda
@pytest.mark.parametrize(
    ("every", "exit_every", "fuse", "accumulated"),
    [  # masked runs and exits are captured at the same step, or one of them while the other replays
        (1, 1, False, False),
        (1, 1, False, True),
        (4, 1, False, True),
        (4, 1, True, False),
        (1, 4, False, False),
    ],
)
def test_replayed_steps_leave_the_gradients_of_runs_in_the_weights(
    every: int, exit_every: int, fuse: bool, accumulated: bool
) -> None:
    model, batches = on_cuda()
    options: dict[str, Any] = {
        "share": 1.0, "crop": 16, "every": every, "exit_every": exit_every, "exit_tokens": 0.5,
        "fuse": fuse,
    }  # fmt: skip
    terms = [
        DensityLoss(model, **options, cuda_graph=each, exit_map=False) for each in (True, False)
    ]
    found: list[list[torch.Tensor]] = []
    for density in terms:
        model.zero_grad()
        read = []
        for step, ids in enumerate(4 * batches):
            with density.watching(step=step, batch={"input_ids": ids}) as watched:
                loss = model(input_ids=ids, labels=ids).loss
            (loss + 3 * density(ids, step=step, watched=watched).loss).backward()
            read += [each.grad.clone() for each in model.parameters() if each.grad is not None]
            if not accumulated:
                model.zero_grad()
        found.append(read)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=3e-5)
    kinds = terms[0]._captured.graphs, terms[0]._exit_term.graphs
    replayed = [each for kind in kinds for each in kind.known.values()]
    assert [each.number >= 4 for each in replayed] == [True, True]
    assert len({each._graph.pool() for each in replayed}) == 1


@cuda
def test_a_replayed_step_waits_for_nothing() -> None:
    model, batches = on_cuda()
    density = DensityLoss(model, share=1.0, crop=16, every=2, exit_every=2, exit_tokens=0.5)
    for step, ids in enumerate([*batches, *batches]):
        inputs = {"input_ids": ids, "labels": ids.clone()}
        replayed = step >= 6
        with refusing_to_wait() if replayed else nullcontext():
            with density.watching(step=step, batch=inputs) as watched:
                loss = model(**inputs).loss
            term = density(ids, None, inputs["labels"], step=step, watched=watched)
            (loss + term.loss).backward()
        assert not replayed or (term.exit_distance is not None) == (step % 2 == 1)
    for graphs in (density._captured.graphs, density._exit_term.graphs):
        assert next(iter(graphs.known.values())).number > 0


@cuda
@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_what_was_not_finite_in_a_replay_is_left_out_and_said_at_the_next_step(
    mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = on_cuda()
    density = DensityLoss(model, share=1.0, crop=16, every=1, exits=0.0, on_nonfinite=mode)
    for step in range(3):
        gradients(model, density(batches[step], step=step).loss)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        kept = weight.clone()
        weight[0, 0] = torch.nan
    term = density(batches[3], step=3)
    assert term.loss == 0
    for gradient in gradients(model, term.loss):
        assert not gradient.any()
    with torch.no_grad():
        weight.copy_(kept)
    named = "step 3: logits of the full model or of the masked run are NaN or infinite"
    if mode == "raise":
        with pytest.raises(NonFiniteError, match=named):
            density(batches[4], step=4)
    else:
        assert density(batches[4], step=4).loss > 0
        assert named in caplog.text
    assert density(batches[4], step=5).loss > 0


@cuda
def test_two_terms_before_one_backward_pass_are_both_right() -> None:
    model, batches = on_cuda()
    captured = DensityLoss(model, share=1.0, crop=16, every=1, exits=0.0)
    for step in range(3):
        gradients(model, captured(batches[step], step=step).loss)
    first, second = (captured(batches[step], step=step).loss for step in (3, 4))
    together = gradients(model, first + second)
    apart = [gradients(model, captured(batches[step], step=step).loss) for step in (3, 4)]
    for both, a, b in zip(together, *apart, strict=True):
        torch.testing.assert_close(both, a + b, rtol=1e-3, atol=1e-5)


@cuda
def test_what_cannot_be_captured_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = on_cuda()

    def reading(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits[..., 0] + float(logits.mean())  # waits for the device

    captured = DensityLoss(model, share=1.0, crop=16, every=1, exits=0.0, easiness=reading)
    plain = DensityLoss(
        model, share=1.0, crop=16, every=1, exits=0.0, easiness=reading, cuda_graph=False
    )
    for step, ids in enumerate(batches):
        found = captured(ids, step=step)
        torch.testing.assert_close(found.loss, plain(ids, step=step).loss)
        torch.rand(3, device="cuda")  # the generator does not wait for a capture to end
    assert [record.message.partition(" as a CUDA graph")[0] for record in caplog.records] == [
        "the masked runs cannot be captured"
    ]
