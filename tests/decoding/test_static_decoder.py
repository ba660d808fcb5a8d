"""Decoding by steps of fixed shapes: the same tokens, no compilation after the first text."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, masking_utils

from softtrace.decoding import Sampling, StaticDecoder, check_early_exit, greedy, speculate
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.model.exit_maps import ExitMaps, set_exit_maps
from tests.support.cuda_waits import refusing_to_wait
from tests.support.skips import cuda
from tests.support.tiny import tiny_model, tiny_prompt

NEW = 20


def decoder(model: nn.Module, **options: Any) -> StaticDecoder:
    usual = {"exit_layer": 2, "draft_tokens": 3, "capacity": 64, "backend": None}
    return StaticDecoder(model, **{**usual, "eos_token_id": -1, **options})


def prompts_of(*lengths: int) -> list[Tensor]:
    return [tiny_prompt(length, seed=length)[0] for length in lengths]


def tokens_of(found: list[Any]) -> list[list[int]]:
    return [each.tokens.tolist() for each in found]


def graphs() -> int:
    """Graphs that were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("family", "attention", "dtype"),
    [  # the second slides, the third mixes layers
        ("llama", "sdpa", torch.float64),
        ("mistral", "sdpa", torch.float64),
        pytest.param("smollm3", "sdpa", torch.float64, marks=pytest.mark.thorough),
        ("mistral", "eager", torch.float32),  # transformers' eager masks overflow in float64
    ],
)
def test_texts_of_a_batch_are_those_of_plain_decoding(
    family: str, attention: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family, seed=2, dtype=dtype)
    model.set_attn_implementation(attention)
    wanted = [greedy(model, row[None], NEW, -1).tokens.tolist() for row in prompts_of(5, 1, 17)]
    for depth, draft in ((1, 1), (2, 4)):
        static = decoder(model, exit_layer=depth, draft_tokens=draft, rows=4)  # one row stays empty
        for write in (static.plain, static.speculate, static.plain):  # nothing of one text stays
            assert tokens_of(write(prompts_of(5, 1, 17), NEW)) == wanted
        assert tokens_of(static.speculate(prompts_of(17), NEW)) == wanted[2:]


def test_counts_mean_what_those_of_the_eager_loop_mean() -> None:
    model, row = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)
    static = decoder(model, draft_tokens=4).speculate([row], NEW)[0]
    eager = speculate(
        model, row, exit_layer=2, max_new_tokens=NEW, draft_tokens=4, confidence=0, eos_token_id=-1
    )
    assert torch.equal(static.tokens, eager.tokens)
    # The eager loop writes the first token with the prompt, and drafts from the second.
    for found in (static, eager):
        assert 0 < found.accepted < found.reached < found.drafted
        assert found.acceptance_each == found.accepted / found.reached
        # A wrong guess is the last one reached of its draft, and there is one a check at most.
        assert found.reached - found.accepted <= found.checks
    assert static.accepted + static.checks == NEW
    assert decoder(model).plain([row], NEW)[0].drafted == 0
    assert eager.accepted + eager.checks == NEW - 1
    # An unsure guess, which ends its draft, is read by no check.
    static = decoder(model, draft_tokens=4, confidence=1.0).speculate([row], NEW)[0]
    eager = speculate(
        model, row, exit_layer=2, max_new_tokens=NEW, draft_tokens=4, confidence=1, eos_token_id=-1
    )
    for found, checks in ((static, NEW), (eager, NEW - 1)):
        assert (found.drafted, found.reached, found.checks) == (0, 0, checks)


def test_a_model_whose_upper_layers_do_nothing_accepts_every_guess() -> None:
    model = tiny_model("llama", seed=3, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    found = decoder(model, exit_layer=1, draft_tokens=4, rows=2).speculate(prompts_of(5, 9), NEW)
    for each in found:
        assert (each.drafted, each.accepted, each.checks) == (3 * NEW // 4, 3 * NEW // 4, NEW // 4)
        assert (each.reached, each.acceptance_each) == (each.accepted, 1.0)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_last_token_of_a_draft_is_read_without_the_head(adapters: bool) -> None:
    model, row = tiny_model("llama", seed=3), tiny_prompt(5)[0]
    heads: list[nn.Module] = []
    model.lm_head.register_forward_hook(lambda *args: heads.append(args[0]))
    runs: Any = model
    if adapters:
        from peft import LoraConfig, get_peft_model

        runs = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    static = decoder(runs, draft_tokens=4)
    heads.clear()
    found = static.speculate([row], 9)[0]
    assert len(heads) == 1 + found.drafted + found.checks  # one over the prompt


@pytest.mark.parametrize("new", [1, 5, 9])
def test_no_layer_runs_for_tokens_that_are_not_written(new: int) -> None:
    model, row = tiny_model("llama", seed=3), tiny_prompt(5)[0]
    ran: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: ran.append(args[2].shape[1]))
    static = decoder(model, draft_tokens=4)
    static.plain([row], new)
    ran.clear()
    static.plain([row], new)
    assert ran == [4, *[1] * new]  # the prompt but its last token, and one run a token
    ran.clear()
    found = static.speculate([row], new)[0]
    assert ran.count(1) >= found.drafted + found.checks  # and the last guess, which says nothing
    assert max(ran[1:]) <= min(4, new)
    handle.remove()


#: rotary frequencies change beyond so many tokens
LIMIT = 24
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 3.0, "short_factor": [1.0] * 4,
    "long_factor": [9.0] * 4, "original_max_position_embeddings": LIMIT,
}  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "fine"),
    [  # of prompts that are written at once, eight tokens each
        ((5, 9), True),
        ((26, 40), True),
        ((LIMIT + 1, LIMIT + 2), True),
        ((5, 40), False),  # the second's frequencies would be the first's
        ((LIMIT + 1,), False),  # all but the last token of it are read with the other ones
        ((20,), False),
        ((5, 16), False),  # the second reads guesses beyond its end while the first still writes
    ],
)
def test_rows_of_one_run_have_one_run_s_frequencies(lengths: tuple[int, ...], fine: bool) -> None:
    model = tiny_model("llama", seed=2, rope_parameters=LONG)
    static, rows = decoder(model, rows=len(lengths)), prompts_of(*lengths)
    if not fine:
        with pytest.raises(UnsupportedModelError, match="changes its rotary frequencies"):
            static.speculate(rows, 8)
        return
    wanted = [greedy(model, row[None], 8, -1).tokens.tolist() for row in rows]
    assert tokens_of(static.speculate(rows, 8)) == wanted
    assert tokens_of(static.plain(rows, 8)) == wanted


def test_each_text_ends_by_itself() -> None:
    model, rows = tiny_model("llama", seed=2, dtype=torch.float64), prompts_of(5, 9)
    plain = [greedy(model, row[None], NEW, -1).tokens.tolist() for row in rows]
    for end in {plain[0][3], plain[0][10], plain[1][6]}:
        wanted = [greedy(model, row[None], NEW, end).tokens.tolist() for row in rows]
        static = decoder(model, draft_tokens=4, rows=2, eos_token_id=end)
        assert tokens_of(static.speculate(rows, NEW)) == wanted
        assert tokens_of(static.plain(rows, NEW)) == wanted
    ends = [plain[0][3], plain[1][6]]
    wanted = [greedy(model, row[None], NEW, ends).tokens.tolist() for row in rows]
    assert tokens_of(decoder(model, rows=2, eos_token_id=ends).speculate(rows, NEW)) == wanted


@pytest.mark.thorough
def test_nothing_is_compiled_after_the_first_text() -> None:
    model = tiny_model("llama", seed=2, num_hidden_layers=2, dtype=torch.float64)
    static = decoder(model, exit_layer=1, rows=2, backend="eager")
    before = graphs()
    static.plain(prompts_of(5), 4)
    static.speculate(prompts_of(5), 4)
    after = graphs()
    assert after - before == 4  # a token, a guess, the last one, a check: each one graph, whole
    for lengths, new in (((3, 40), 20), ((1,), 9), ((11, 2), 1)):
        rows = prompts_of(*lengths)
        wanted = [greedy(model, row[None], new, -1).tokens.tolist() for row in rows]
        assert tokens_of(static.plain(rows, new)) == wanted
        assert tokens_of(static.speculate(rows, new)) == wanted
    assert graphs() == after


@pytest.mark.thorough
def test_nor_is_it_for_other_ways_to_guess() -> None:
    model = tiny_model("llama", seed=2, num_hidden_layers=2)
    static = decoder(
        model,
        exit_layer=1,
        rows=2,
        backend="eager",
        draft="both",
        confidence=0.05,
        sampling=Sampling(),
    )
    repeated = tiny_prompt(4)[0].repeat(3)
    before = graphs()
    static.plain(prompts_of(5), 4)
    static.speculate(prompts_of(5), 4)
    after = graphs()
    assert after - before == 6  # those four, a look, a check of what was looked up
    for rows in ([repeated], [repeated, tiny_prompt(9)[0]], prompts_of(40)):
        static.plain(rows, 7)
        static.speculate(rows, 11)
    assert graphs() == after


@pytest.mark.thorough
def test_other_weights_are_those_that_write() -> None:
    small: dict[str, Any] = {"num_hidden_layers": 2, "dtype": torch.float64}  # soon compiled
    model, row = tiny_model("llama", seed=2, **small), tiny_prompt(5)[0]
    other = tiny_model("llama", seed=5, **small)
    static = decoder(model, exit_layer=1, backend="eager")
    wanted = [greedy(each, row[None], NEW, -1).tokens.tolist() for each in (model, other)]
    assert wanted[0] != wanted[1]
    assert tokens_of(static.speculate([row], NEW)) == wanted[:1]
    made = graphs()
    model.load_state_dict(other.state_dict())  # in place: nothing to be made anew
    assert tokens_of(static.speculate([row], NEW)) == wanted[1:]
    assert graphs() == made
    runner = static._runner
    ready = [*runner._ready.values()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data.clone()
    assert tokens_of(static.speculate([row], NEW)) == wanted[1:]
    assert not any(step in ready for step in runner._ready.values())
    model.train()
    with pytest.raises(InvalidInputError, match="train mode"):
        static.plain([row], 2)
    model.eval().model.layers[0].mlp = other.model.layers[0].mlp
    with pytest.raises(InvalidInputError, match="modules of it were replaced"):
        static.plain([row], 2)


@cuda
@pytest.mark.filterwarnings("ignore")  # the compiler's own: of TorchScript, and of TensorFloat32
@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("draft", ["exit", "lookup", "both"])
def test_captured_steps_write_the_same(backend: str | None, draft: str) -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64).cuda()
    rows = [row.cuda() for row in prompts_of(5, 1, 17)]
    wanted = [greedy(model, row[None], NEW, -1).tokens.tolist() for row in rows]
    static = decoder(model, rows=3, backend=backend, draft=draft)
    for _ in range(2):
        assert tokens_of(static.plain(rows, NEW)) == wanted
        assert tokens_of(static.speculate(rows, NEW)) == wanted


@cuda
@pytest.mark.parametrize("captured", [True, False])
def test_nothing_waits_for_the_device_inside_a_draft(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64).cuda()
    row, own = tiny_prompt(5)[0].cuda(), StaticDecoder._guess
    drafts: list[int] = []

    def guess(self: StaticDecoder, count: int) -> int:
        with refusing_to_wait():
            drafts.append(own(self, count))
        return drafts[-1]

    monkeypatch.setattr(StaticDecoder, "_guess", guess)
    usual: dict[str, Any] = {"draft_tokens": 4, "cuda_graphs": captured}
    for sampling in (None, Sampling()):
        drafts.clear()
        decoder(model, **usual, sampling=sampling).speculate([row], NEW)
        assert max(drafts) == 4
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):  # as the doubting do
        decoder(model, **usual, confidence=0.5).speculate([row], NEW)


@cuda
def test_maps_that_were_loaded_before_the_model_moved_are_captured() -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    set_exit_maps(model, ExitMaps([2], model.config.hidden_size))
    row = tiny_prompt(5)[0].cuda()
    static = decoder(model.cuda(), exit_layer=2, backend=None)
    assert tokens_of(static.speculate([row], NEW)) == tokens_of(static.plain([row], NEW))


@cuda
def test_captured_steps_draw_anew_every_time() -> None:
    model = tiny_model("llama", seed=2).cuda()
    row = tiny_prompt(5)[0].cuda()
    static = decoder(model, rows=8, sampling=Sampling(temperature=2.0))
    found = [
        tuple(tokens) for _ in range(4) for tokens in tokens_of(static.speculate([row] * 8, 9))
    ]
    assert len(set(found)) > 16


@pytest.mark.thorough
def test_inference_mode_changes_and_compiles_nothing() -> None:
    model = tiny_model("llama", seed=2, num_hidden_layers=2)
    row = tiny_prompt(5)[0]
    with torch.inference_mode():
        wanted = tokens_of([greedy(model, row[None], NEW, -1)])
        static = decoder(model, exit_layer=1, backend="eager")
        assert tokens_of(static.speculate([row.clone()], NEW)) == wanted
    made = graphs()
    assert tokens_of(static.speculate([row], NEW)) == wanted
    assert graphs() == made


def test_an_exit_map_changes_guesses_and_no_text() -> None:
    model, row = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)
    with torch.no_grad():  # the rest of the model only scales what the exit reads
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    turned = nn.Linear(32, 32, bias=False, dtype=torch.float64)
    with torch.no_grad():
        turned.weight.copy_(-torch.eye(32))
    plain = decoder(model).speculate([row], NEW)[0]
    mapped = decoder(model, exit_map=turned).speculate([row], NEW)[0]
    assert torch.equal(plain.tokens, mapped.tokens)
    assert plain.accepted == plain.drafted
    assert mapped.accepted < mapped.drafted


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = tiny_model("llama", seed=2), tiny_prompt(5)
    with torch.no_grad():
        wanted = model(row).logits
    static = decoder(model)
    static.speculate([row], 5)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _broken)
    with pytest.raises(RuntimeError, match="broken"):
        static.speculate([row], 5)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(model(row).logits, wanted)
    assert model.config.num_hidden_layers == 3
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_others_put_in_place_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's forward, and the process's function for masks."""
    model, row = tiny_model("llama", seed=2), tiny_prompt(5)
    layer, masks = model.model.layers[0], masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
    forward, own = partial(layer.forward), partial(masking_utils.sdpa_mask)
    layer.forward = forward
    monkeypatch.setitem(masks, "sdpa", own)
    decoder(model).speculate([row], NEW)
    assert vars(layer)["forward"] is forward
    assert masks["sdpa"] is own


def _broken(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("broken")


@pytest.mark.parametrize("read", [1, 2])
def test_nothing_of_a_draft_that_was_interrupted_stays(read: int) -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    row, other = prompts_of(5, 9)
    wanted = greedy(model, other[None], 3, -1).tokens.tolist()
    static, heads = decoder(model, draft_tokens=6), iter(range(1 + read))

    def interrupt(*_: Any) -> None:
        if next(heads, None) is None:
            raise KeyboardInterrupt

    with model.lm_head.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        static.speculate([row], NEW)
    assert tokens_of(static.speculate([other], 3)) == [wanted]


def test_weights_of_another_kind_are_refused() -> None:
    model, row = tiny_model("llama", seed=2), tiny_prompt(5)[0]
    static = decoder(model)
    wanted = tokens_of(static.speculate([row], 5))
    model.bfloat16()
    for write in (static.plain, static.speculate):
        with pytest.raises(InvalidInputError, match=r"bfloat16 on cpu.*those in .*float32 on cpu"):
            write([row], 5)
    model.float().load_state_dict(tiny_model("llama", seed=2).state_dict())
    assert tokens_of(static.speculate([row], 5)) == wanted


def test_a_backend_that_fails_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"not compiled by 'no such'.*backend=None"):
        decoder(tiny_model("llama"), backend="no such").plain([tiny_prompt(5)[0]], 2)


def test_what_cannot_be_is_named() -> None:
    model, row = tiny_model("llama", seed=2), tiny_prompt(5)[0]
    proven = check_early_exit(model)
    for options, said in (
        ({"exit_layer": 3}, "exit_layer: found 3, allowed 1 to 2"),
        ({"draft_tokens": 0}, "draft_tokens: found 0"),
        ({"rows": 0}, "rows: found 0"),
        ({"cuda_graphs": True}, "cuda_graphs: found True with the model on cpu"),
        ({"proven_exit": check_early_exit(tiny_model("llama"))}, "found one of another model"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            decoder(model, **{"proven_exit": proven, **options})
    static = decoder(model, proven_exit=proven, capacity=16)
    for prompts, new, said in (
        ([row, row], 2, "prompts: found .* allowed are 1 to 1"),
        ([], 2, "prompts: found"),
        ([row[:0]], 2, "prompts: found"),
        ([[5, 9]], 2, "found list, expected a tensor"),
        (BatchEncoding({"input_ids": row[None]}), 2, "found BatchEncoding.* under .input_ids"),
        ([row + 1000], 2, "found ids from .* allowed are 0 to 66"),
        ([row.float()], 2, "expected int64"),
        ([row], 12, "comes to 17 tokens with 12 new ones, allowed are 16"),
        ([row], 0, "max_new_tokens: found 0"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            static.plain(prompts, new)
    assert len(static.speculate([row], 11)[0].tokens) == 11
    model.generation_config.bad_words_ids = [[5]]
    with pytest.raises(InvalidInputError, match=r"NoBadWordsLogitsProcessor.*speculate"):
        decoder(model, proven_exit=proven)
    with pytest.raises(InvalidInputError, match="changed since the decoder was made"):
        static.speculate([row], 2)
    model.generation_config.bad_words_ids = None
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InvalidInputError, match="autocast: found it on for cpu"),
    ):
        static.plain([row], 2)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="'flex_attention' attention"):
        decoder(model, proven_exit=proven)
