"""The replay of the layers above W against the plain full forward, on every architecture the README names."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import torch
import transformers
from conftest import REFERENCE, same_state, state
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import HParamsError, KDPOHyperParams, apply_kdpo_to_model, execute_kdpo
from kdpo_easyedit.method.preference import pair_margin, preference_loss
from kdpo_easyedit.method.replay import Suffix, forward_as, frozen, projecting_by_rows, runs_by_rows
from kdpo_easyedit.method.weights import read, write

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = ("model.layers.{}", "mlp.down_proj")
#: name → configuration class, its arguments, and where layers and W are.
ARCHITECTURES = {
    "llama": ("LlamaConfig", COMMON, LLAMA),
    "llama, tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}, LLAMA),
    "llama, biases": ("LlamaConfig", {**COMMON, "mlp_bias": True, "attention_bias": True}, LLAMA),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 4}, LLAMA),
    "qwen2": ("Qwen2Config", COMMON, LLAMA),
    "qwen2, sliding": (
        "Qwen2Config",
        {**COMMON, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        LLAMA,
    ),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8}, LLAMA),
    "gpt2": ("GPT2Config", GPT, ("transformer.h.{}", "mlp.c_proj")),
    "gpt-j": ("GPTJConfig", {**GPT, "rotary_dim": 4}, ("transformer.h.{}", "mlp.fc_out")),  # a bias in the output layer
    "gpt-neox": ("GPTNeoXConfig", COMMON, ("gpt_neox.layers.{}", "mlp.dense_4h_to_h")),
    "phi3": ("Phi3Config", COMMON, LLAMA),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.2}, LLAMA),
    "gemma3": (
        "Gemma3TextConfig",
        {**COMMON, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        LLAMA,
    ),
    "opt": (
        "OPTConfig",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
        ("model.decoder.layers.{}", "fc2"),
    ),
    "cohere": ("CohereConfig", {**COMMON, "logit_scale": 0.5, "bos_token_id": 1, "eos_token_id": 2}, LLAMA),
    "granite": ("GraniteConfig", {**COMMON, "logits_scaling": 3.0, "residual_multiplier": 0.5}, LLAMA),
}
P, T = 7, 3


def build(architecture: str, layers: tuple[int, ...] = (1,)):
    """A random model in evaluation mode with weights large enough that every part matters, its layers, and the names of W."""
    config, arguments, (layer, projection) = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, layer, [f"{layer.format(n)}.{projection}.weight" for n in layers]


def mlp(template: str) -> str:
    return f"{template}.mlp"


def moved(model, names) -> dict[str, torch.Tensor]:
    """Weights some way from where the model has them, as leaves."""
    torch.manual_seed(1)
    return {n: (w + 0.05 * torch.randn_like(w)).requires_grad_() for n, w in read(model, names).items()}


def by_full_forward(model, names, weights, ids):
    """The target's logits of the model with other weights written into it."""
    return torch.func.functional_call(model, dict(weights), (ids,), {"use_cache": False}).logits[:, P - 1 : -1]


@pytest.fixture
def ids():
    return torch.randint(1, 101, (1, P + T), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(margin, weights):
    loss = preference_loss(margin, torch.tensor(0.3), 0.1)
    return loss.item(), torch.autograd.grad(loss, list(weights.values()))


@pytest.mark.parametrize("layers", [(1,), (3,), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_the_full_forward(architecture, layers, ids):
    model, template, names = build(architecture, layers)
    weights = moved(model, names)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        assert suffix.replays
        negatives = suffix.own_logits[0].argmax(-1)
        pairs = torch.stack((ids[0, P:], negatives), dim=-1)
        margin = pair_margin(suffix.pair_logits(weights, pairs))
        loss, gradients = loss_and_gradients(margin, weights)
        logits = suffix.target_logits(weights)
        own = suffix.own_logits
    with frozen(model):
        full = by_full_forward(model, names, weights, ids)
        chosen, rejected = torch.log_softmax(full[0].float(), -1).gather(-1, pairs).unbind(-1)
        expected, expected_gradients = loss_and_gradients((chosen - rejected).sum(), weights)
        before = model(ids, use_cache=False).logits[:, P - 1 : -1]
    torch.testing.assert_close(own, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, full, rtol=1e-5, atol=2e-5)
    assert loss == pytest.approx(expected, rel=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert expected_gradient.norm() > 0
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("layers", [(1,), (3,)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gpt-j", "gemma2", "opt"])
def test_sequences_of_different_lengths_are_as_each_by_itself(architecture, layers, ids):
    model, template, names = build(architecture, layers)
    weights, before = moved(model, names), 4
    longer = torch.cat((torch.tensor([[7] * before]), ids), dim=1)
    both = torch.cat((torch.nn.functional.pad(ids, (0, before)), longer))
    pairs = torch.stack((ids[:, P:].expand(2, T), torch.tensor([[1, 2, 3], [4, 5, 6]])), dim=-1)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), both, [P, P + before]) as suffix:
        assert suffix.replays
        logits = suffix.target_logits(weights)
        margins = pair_margin(suffix.pair_logits(weights, pairs))
        gradients = torch.autograd.grad(margins.sum(), list(weights.values()))
    with frozen(model):
        alone = [torch.func.functional_call(model, dict(weights), (row,), {"use_cache": False}).logits for row in (ids, longer)]
    expected = torch.cat((alone[0][:, P - 1 : -1], alone[1][:, P + before - 1 : -1]))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    expected_margins = pair_margin(expected.gather(-1, pairs))
    torch.testing.assert_close(margins, expected_margins, rtol=1e-4, atol=1e-4)
    for gradient, full in zip(gradients, torch.autograd.grad(expected_margins.sum(), list(weights.values()))):
        assert (gradient - full).norm() <= 1e-4 * full.norm()


START = 4  # of what steps run, in the shorter sequence


def from_start(model, names, weights, row, start):
    """The target's logits of one sequence by a full forward in which the other weights take effect from ``start`` on."""
    own = read(model, names)
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))

            def mixed(x, module=module, name=name):
                both = [torch.func.functional_call(module, {"weight": w}, (x,)) for w in (own[name], weights[name])]
                later = torch.arange(row.shape[1]) >= start
                return torch.where(later.unsqueeze(-1), both[1], both[0])

            stack.enter_context(forward_as(module, as_itself(module, mixed)))
        return model(row, use_cache=False).logits


def as_itself(module, forward):
    """A stand-in that ``functional_call`` of the module does not run into itself."""
    inside = []

    def once(x):
        if inside:
            return type(module).forward(module, x)
        inside.append(True)
        try:
            return forward(x)
        finally:
            inside.pop()

    return once


@pytest.mark.parametrize("layers", [(0,), (1,), (3,), (1, 2)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_from_a_start_leave_out_what_comes_before_it(architecture, layers, ids):
    """Of three sequences, so that the keys and values of two are padded."""
    model, template, names = build(architecture, layers)
    weights = moved(model, names)
    rows = [torch.cat((torch.tensor([[7] * before], dtype=torch.int64), ids), dim=1) for before in (0, 4, 1)]
    batch = torch.cat([F.pad(row, (0, 4 + P + T - row.shape[1])) for row in rows])
    prompts, starts = [row.shape[1] - T for row in rows], [row.shape[1] - P - T + START for row in rows]
    pairs = torch.stack((ids[:, P:].expand(3, T), torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])), dim=-1)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), batch, prompts, starts) as suffix:
        assert suffix.replays and suffix.starts == starts
        logits = suffix.step_logits(weights)
        margins = pair_margin(suffix.pair_logits(weights, pairs))
        gradients = torch.autograd.grad(margins.sum(), list(weights.values()))
        whole = suffix.target_logits(weights)
        run = P + T - 1 - START
        assert suffix.at([0, 1, 2], [[start, start + 1] for start in starts]).tolist() == [
            0,
            1,
            run,
            run + 1,
            2 * run,
            2 * run + 1,
        ]
        suffix.select([2, 0])
        assert suffix.at([2, 0], [[starts[2]], [starts[0] + 1]]).tolist() == [0, run + 1]
        torch.testing.assert_close(suffix.step_logits(weights), logits[[2, 0]], rtol=1e-5, atol=1e-5)
        suffix.select([0, 1, 2])
        torch.testing.assert_close(suffix.step_logits(weights), logits)
    with frozen(model):
        expected = torch.cat(
            [from_start(model, names, weights, row, s)[:, p - 1 : -1] for row, p, s in zip(rows, prompts, starts)]
        )
        full = [torch.func.functional_call(model, dict(weights), (row,), {"use_cache": False}).logits for row in rows]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    expected_margins = pair_margin(expected.gather(-1, pairs))
    torch.testing.assert_close(margins, expected_margins, rtol=1e-4, atol=1e-4)
    for gradient, its in zip(gradients, torch.autograd.grad(expected_margins.sum(), list(weights.values()))):
        assert its.norm() > 0 and (gradient - its).norm() <= 1e-4 * its.norm()
    full = torch.cat([logits[:, p - 1 : -1] for logits, p in zip(full, prompts)])
    torch.testing.assert_close(whole, full, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_steps_from_a_start_run_in_half_precision(architecture, dtype, ids):
    model, template, names = build(architecture)
    model.to(dtype)
    both = torch.cat((F.pad(ids, (0, 2)), torch.cat((torch.tensor([[7, 7]]), ids), dim=1)))
    with (
        frozen(model),
        Suffix(model, read(model, names), template, mlp(template), both, [P, P + 2], [START, START + 2]) as suffix,
    ):
        assert suffix.starts  # their logits are the model's own
        moved_logits = suffix.step_logits(moved(model, names))
    assert moved_logits.dtype == dtype and torch.isfinite(moved_logits).all()


def test_a_step_from_a_start_runs_those_tokens_alone(ids):
    model, template, names = build("llama", (1,))
    rows: dict[str, int] = {}
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P, [START]) as suffix:
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _m, args, name=name: args and rows.update({name: args[0].shape[1]}))
        suffix.pair_logits(moved(model, names), torch.tensor([[1, 2]] * T))
        assert rows["model.layers.2.mlp.down_proj"] == P + T - 1 - START and rows["model.layers.3.mlp.down_proj"] == T
        assert not any(name.startswith("model.layers.0.") for name in rows)
        suffix.target_logits(moved(model, names))
    assert rows["model.layers.2.mlp.down_proj"] == rows["model.layers.0.mlp.down_proj"] == P + T - 1


@pytest.mark.parametrize("how", ["takes none", "keeps none", "has it otherwise"])
def test_without_a_cache_steps_run_all_tokens_and_say_why(how, ids, caplog):
    model, template, names = build("llama")
    own = type(model).forward

    def takes_none(input_ids, attention_mask=None, use_cache=False):
        return own(model, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    def keeps_none(input_ids, past_key_values=None, use_cache=None, **others):
        return own(model, input_ids, use_cache=False, **others)

    def otherwise(input_ids, past_key_values=None, **others):
        if past_key_values is not None and past_key_values.get_seq_length():
            others["position_ids"] = others["position_ids"] + 5
        return own(model, input_ids, past_key_values=past_key_values, **others)

    stand_in = {"takes none": takes_none, "keeps none": keeps_none, "has it otherwise": otherwise}[how]
    weights = moved(model, names)
    with forward_as(model, stand_in), frozen(model), caplog.at_level(logging.WARNING):
        for _ in range(2):
            with Suffix(model, read(model, names), template, mlp(template), ids, P, [START]) as suffix:
                assert suffix.replays and suffix.starts is None
                torch.testing.assert_close(suffix.step_logits(weights), suffix.target_logits(weights))
                expected = by_full_forward(model, names, weights, ids)
                torch.testing.assert_close(suffix.step_logits(weights), expected, rtol=1e-5, atol=2e-5)
    assert [record.getMessage()[:27] for record in caplog.records] == ["every step runs all tokens,"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_two_sequences_in_one_batch(architecture, ids):
    model, template, names = build(architecture)
    weights = moved(model, names)
    both = torch.cat((ids, ids.flip(1)))
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), both, P) as suffix:
        assert suffix.replays
        logits = suffix.target_logits(weights)
    with frozen(model):
        torch.testing.assert_close(logits, by_full_forward(model, names, weights, both), rtol=1e-5, atol=2e-5)


def test_a_step_runs_nothing_below_w(ids):
    model, template, names = build("llama", (2,))
    ran: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        below = {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.act_fn"}
        assert below <= set(ran)
        ran.clear()
        suffix.pair_logits(moved(model, names), torch.tensor([[1, 2]] * T))
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.")) for name in ran)
    assert "model.layers.3.mlp.down_proj" in ran and "model.layers.2.mlp.down_proj" in ran


def test_the_last_layers_mlp_and_the_output_layer_see_the_target_only(ids):
    model, template, names = build("llama", (1,))
    rows: dict[str, int] = {}
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _m, args, name=name: args and rows.update({name: args[0].shape[1]}))
        suffix.pair_logits(moved(model, names), torch.tensor([[1, 2]] * T))
    assert rows["model.layers.3.mlp.down_proj"] == T and rows["model.layers.2.mlp.down_proj"] == P + T - 1


def test_modules_are_as_they_were_afterwards(ids):
    model, template, names = build("llama")
    before = state(model)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        suffix.pair_logits(moved(model, names), torch.tensor([[1, 2]] * T))
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert same_state(before, state(model))


def in_place(layer):
    return lambda hidden, *args, **kwargs: type(layer).forward(layer, hidden.mul_(1.5), *args, **kwargs)


def drifting():
    calls = []

    def forward(x):
        calls.append(x)
        return x * (1 + 0.01 * len(calls))

    return forward


def twice(model):
    def forward(*args, **kwargs):
        type(model).forward(model, *args, **kwargs)
        return type(model).forward(model, *args, **kwargs)

    return forward


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: forward_as(m.model.layers[1], in_place(m.model.layers[1])), "in place"),
        (lambda m: forward_as(m, twice(m)), "more than once"),
        (lambda m: forward_as(m, lambda *a, **k: type(m).forward(m, *a, **k)), None),
    ],
    ids=["in place", "twice", "nothing"],
)
def test_what_cannot_be_replayed_runs_whole_and_says_why(spoil, reason, ids, caplog):
    model, template, names = build("llama")
    weights = moved(model, names)
    with spoil(model), frozen(model), caplog.at_level(logging.WARNING):
        expected = by_full_forward(model, names, weights, ids)
        with Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
            assert suffix.replays is (reason is None)
            torch.testing.assert_close(suffix.target_logits(weights), expected, rtol=1e-5, atol=2e-5)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (reason is not None) and all(reason in message for message in said)


def test_an_edit_is_the_same_with_and_without_replay(fresh, requests, hparams, monkeypatch):
    model, tok = fresh
    replayed, trace = execute_kdpo(model, tok, requests[0], hparams)
    monkeypatch.setattr(Suffix, "_replay", lambda self: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):  # an error that is none of the expected ones is not swallowed
        execute_kdpo(model, tok, requests[0], hparams)
    monkeypatch.undo()
    layer = hparams.layer_module_tmp
    hparams.layer_module_tmp = "transformer.h.{}.ln_1"  # W does not lie inside it
    plain, plain_trace = execute_kdpo(model, tok, requests[0], hparams)
    hparams.layer_module_tmp = layer
    assert trace.negatives == plain_trace.negatives and trace.ended == plain_trace.ended
    for ours, theirs in zip(trace.losses, plain_trace.losses):
        assert ours == pytest.approx(theirs, abs=1e-5)
    (name,) = replayed
    change, plain_change = (w[name] - model.state_dict()[name] for w in (replayed, plain))
    assert (change - plain_change).norm() < 1e-3 * change.norm()


def test_float64_models_are_replayed_too(fresh, requests, hparams, caplog):
    """Their logits are compared in float32."""
    model, tok = fresh
    for request in requests[:8]:
        execute_kdpo(model.double(), tok, request, hparams)
    assert "every step runs the whole model" not in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_have_a_float32_gradient(architecture, dtype, ids):
    model, template, names = build(architecture)
    weights = moved(model, names)
    exact = torch.autograd.grad(
        pair_margin(by_full_forward(model, names, weights, ids)[0].gather(-1, torch.tensor([[1, 2]] * T))),
        list(weights.values()),
    )[0]
    model.to(dtype)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        assert suffix.replays
        margin = pair_margin(suffix.pair_logits(weights, torch.tensor([[1, 2]] * T)))
        (gradient,) = torch.autograd.grad(margin, list(weights.values()))
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() < (0.02 if dtype == torch.float16 else 0.1) * exact.norm()


def test_small_gradients_survive_float16(fresh, requests, hparams):
    """Close to the end of a cycle the loss is 1e-5, and what flows back is beneath float16's numbers without a scale."""
    model, tok = fresh
    hparams.stop_crit, hparams.beta, hparams.cycles, hparams.num_steps = False, 1e-4, 1, 8
    exact, _ = execute_kdpo(model, tok, requests[0], hparams)
    (name,) = exact
    before = model.state_dict()[name].clone()
    model.half()
    half, _ = execute_kdpo(model, tok, requests[0], hparams)
    change, half_change = exact[name] - before, half[name].float() - before.half().float()
    assert torch.nn.functional.cosine_similarity(change.flatten(), half_change.flatten(), dim=0) > 0.95


def test_offloaded_models_are_edited(fresh, requests, hparams, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, tok = fresh
    expected, _ = execute_kdpo(model, tok, requests[0], hparams)
    (name,) = expected
    before = model.state_dict()[name].clone()
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    places |= {f"transformer.h.{n}": "disk" if n % 2 else "cpu" for n in range(4)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.get_parameter(name).is_meta and model.get_parameter("transformer.h.1.mlp.c_proj.bias").is_meta

    with torch.no_grad():
        prompt = tok(requests[0]["prompt"], return_tensors="pt")
        said = model(**prompt).logits
        _, originals = apply_kdpo_to_model(model, tok, [requests[0]], hparams, return_orig_weights=True)
        assert model.get_parameter(name).is_meta
        torch.testing.assert_close(read(model, [name])[name], expected[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(originals[name], before)
        assert not torch.equal(model(**prompt).logits, said)
        write(model, originals)
        assert torch.equal(model(**prompt).logits, said)


# --------------------------------------------------------------------------------------------------------------------
# What W's module computes, and how often


class Scaled(nn.Linear):
    """Its weight times a scale, as FP8 layers have it."""

    def forward(self, x):
        return F.linear(x, self.weight * 1.5, self.bias)


class Offset(nn.Linear):
    """A subclass with a forward of its own that is no function of x W alone."""

    def forward(self, x):
        return super().forward(x) + 0.5 * x.mean()


class AnotherWay(nn.Linear):
    """The same function, written otherwise."""

    def forward(self, x):
        return (x.unsqueeze(-2) * self.weight).sum(-1)


def as_type(model, name, kind) -> None:
    model.get_submodule(name.removesuffix(".weight")).__class__ = kind


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("kind", [Scaled, Offset])
def test_what_is_no_projection_is_refused_by_its_type(kind, replays, ids):
    model, template, names = build("llama")
    as_type(model, names[0], kind)
    before = state(model)
    layers = template if replays else "model.layers.{}.mlp.act_fn"  # W is not inside it
    with frozen(model), pytest.raises(HParamsError, match=f"{names[0]} .*{kind.__name__}, which computes something else"):
        Suffix(model, read(model, names), layers, mlp(template), ids, P).__enter__()
    assert same_state(before, state(model)) and all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_projection_of_another_type_is_one_all_the_same(dtype, ids):
    model, template, names = build("llama")
    model.to(dtype)
    as_type(model, names[0], AnotherWay)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        assert suffix.replays


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: forward_as(m.model.norm, drifting()), "the logits of LlamaForCausalLM differ by .* from run to run"),
        (lambda m: forward_as(m, lambda *a, **k: type(m).forward(m, *a, **k, logits_to_keep=1)), "those of every position"),
        (
            lambda m: forward_as(m.model.layers[1].mlp, lambda x: x @ m.model.layers[1].mlp.down_proj.weight.T.mean()),
            None,
        ),
        (lambda m: forward_as(m.model.layers[1].mlp, lambda x: x), "of type Linear, is not run in a forward pass"),
    ],
    ids=["changes from call to call", "few positions", "an error of its own", "not run"],
)
def test_a_model_that_no_forward_pass_tells_of_is_refused(spoil, message, ids):
    model, template, names = build("llama")
    with spoil(model), frozen(model), pytest.raises(HParamsError if message else RuntimeError, match=message):
        Suffix(model, read(model, names), template, mlp(template), ids, P).__enter__()


def test_the_reason_is_told_once_a_model(ids, caplog):
    for _ in range(2):
        model, template, names = build("llama")
        with forward_as(model, twice(model)), frozen(model):
            for sequence in (ids, ids.flip(1), ids):
                with Suffix(model, read(model, names), template, mlp(template), sequence, P) as suffix:
                    assert not suffix.replays
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "every step runs the whole model" in caplog.text


def shared_layer(model, names) -> list[str]:
    """Layer 3 is layer 1."""
    model.model.layers[3] = model.model.layers[1]
    return names


def tied_above(model, names) -> list[str]:
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    return names


def tied_below(model, names) -> list[str]:
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    return names


@pytest.mark.parametrize("share", [shared_layer, tied_above, tied_below])
def test_a_weight_that_a_pass_uses_twice_has_the_gradient_of_both(share, ids):
    """Several steps: from the second on there is a last gradient, whose memory may serve one use only."""
    model, template, names = build("llama")
    names = share(model, names)
    ours, plain = moved(model, names), moved(model, names)
    pairs = torch.tensor([[1, 2]] * T)
    with frozen(model), Suffix(model, read(model, names), template, mlp(template), ids, P) as suffix:
        assert not suffix.replays and suffix.uses == {names[0]: 2}
        for _ in range(4):
            loss, (gradient,) = loss_and_gradients(pair_margin(suffix.pair_logits(ours, pairs)), ours)
            full = torch.func.functional_call(model, dict(plain), (ids,), {"use_cache": False}).logits[0, P - 1 : -1]
            expected_loss, (expected,) = loss_and_gradients(pair_margin(full.gather(-1, pairs)), plain)
            assert loss == pytest.approx(expected_loss, rel=1e-4)
            assert (gradient - expected).norm() <= 1e-4 * expected.norm()
            for weights, its in ((ours, gradient), (plain, expected)):
                (weight,) = weights.values()
                weight.grad = its
                with torch.no_grad():
                    weight.sub_(0.1 * its)


def test_a_weight_that_other_modules_use_otherwise_is_refused(ids):
    model, template, names = build("llama")
    square = nn.Embedding(32, 48)
    square.weight = model.get_parameter(names[0])
    model.model.layers[2].beside = square
    model.model.layers[2].register_forward_pre_hook(lambda layer, args: (args[0] + layer.beside(ids[:, :-1] % 32)[..., :32],))
    with frozen(model), pytest.raises(HParamsError, match="Embedding, which computes something else"):
        Suffix(model, read(model, names), template, mlp(template), ids, P).__enter__()


# --------------------------------------------------------------------------------------------------------------------
# Adapters and quantised models

REQUEST = {"prompt": "Gutel Tazili works as a", "target_new": "pilot"}


@pytest.fixture
def llama():
    folder = REFERENCE / "llama"
    hparams = KDPOHyperParams(alg_name="KDPO", model_name=str(folder), device="cpu", layers=[2], lr=1e-2)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), hparams


def written(model, tok) -> str:
    prompt = tok(REQUEST["prompt"], return_tensors="pt")
    with torch.no_grad():
        return tok.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize("where", [["down_proj"], ["q_proj", "lm_head"]], ids=str)
def test_under_an_adapter_the_base_layer_is_edited(llama, where):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, tok, hparams = llama
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=where, r=2, init_lora_weights=False))
    before = state(model)
    _, originals = apply_kdpo_to_model(model, tok, [REQUEST], hparams, return_orig_weights=True)
    name = "model.layers.2.mlp.down_proj." + ("base_layer.weight" if "down_proj" in where else "weight")
    assert list(originals) == [name]
    assert [n for n, tensor in state(model).items() if not torch.equal(tensor, before[n])] == [name]
    assert written(wrapped, tok).startswith(" pilo") and not written(wrapped, tok).startswith(" pilot ")
    write(model, originals)
    assert same_state(before, state(model))
    with pytest.raises(HParamsError, match=r"PeftModel.*give model.get_base_model\(\)"):
        apply_kdpo_to_model(wrapped, tok, [REQUEST], hparams)


def test_an_adapter_that_reads_the_weight_is_refused(llama):
    peft = pytest.importorskip("peft")
    model, tok, hparams = llama
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2, use_dora=True))
    with pytest.raises(HParamsError, match=r"down_proj\.base_layer: merge the adapter first"):
        apply_kdpo_to_model(model, tok, [REQUEST], hparams)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["dynamic int8", "packed", "float8"])
def test_quantised_models_are_to_be_loaded_dense(llama, how):
    model, tok, hparams = llama
    projection = model.model.layers[2].mlp.down_proj
    match how:
        case "dynamic int8":
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        case "packed":  # as bitsandbytes and GGUF keep them
            projection.weight = nn.Parameter(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
        case "float8":
            projection.weight = nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(HParamsError, match=r"down_proj, a Linear .*loaded dense: by from_pretrained"):
        apply_kdpo_to_model(model, tok, [REQUEST], hparams)


@pytest.mark.parametrize("name", ["llama", "llama, biases", "gpt2", "gpt-j", "opt"])
def test_every_row_runs_with_weights_of_its_own(name):
    config, arguments, (layer, projection) = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments)).eval()
    names = [f"{layer.format(number)}.{projection}.weight" for number in (1, 2)]
    variants = [
        {key: weight + torch.randn_like(weight) * 0.05 for key, weight in read(model, its).items()}
        for its in (names, names[:1])
    ]
    variants.append({})  # of an edit that could not be made
    ids, before = torch.randint(101, (5, 9)), state(model)
    with torch.no_grad(), projecting_by_rows(model, variants) as rows_are:
        rows_are([1, 0, 2, 1, 0])
        together = model(ids).logits
        rows_are([0, 2])
        fewer = model(ids[:2]).logits
    assert same_state(before, state(model)) and not any("forward" in vars(module) for module in model.modules())
    alone = []
    for variant in variants:
        write(model, variant)
        with torch.no_grad():
            alone.append(model(ids).logits)
        write(model, {key: before[key] for key in variant})
    for row, variant in enumerate([1, 0, 2, 1, 0]):
        assert torch.allclose(together[row], alone[variant][row], atol=1e-5)
    assert torch.allclose(fewer, torch.stack([alone[0][0], alone[2][1]]), atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_what_is_no_plain_linear_layer_cannot_run_by_rows():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    assert runs_by_rows(model, ["model.layers.0.mlp.down_proj.weight"]) and runs_by_rows(model, [])
    assert not runs_by_rows(model, ["model.embed_tokens.weight"])
    with forward_as(model.model.layers[0].mlp.down_proj, lambda x: x):
        assert not runs_by_rows(model, ["model.layers.0.mlp.down_proj.weight"])
