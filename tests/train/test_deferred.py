"""Losses of logits that are never there at once, beside those of whole logits, in many architectures."""

import weakref

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from graft.train import cross_entropy, deferred
from graft.train.attention import predicts_in_place
from graft.train.losses import TokenLoss, shifted_left, shifted_right

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SEQUENCES = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "pad_token_id": 0,
    "decoder_start_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
ENCODER = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")} | {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
MODELS = {
    "a head of its own": ("LlamaForCausalLM", SIZES),
    "a tied head": ("LlamaForCausalLM", SIZES | TIED),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "a head with a bias": ("PhiForCausalLM", SIZES | {"resid_pdrop": 0.0}),
    "a cap": ("Gemma2ForCausalLM", SIZES | {"final_logit_softcapping": 0.5}),
    "a divisor": ("GraniteForCausalLM", SIZES | {"logits_scaling": 3.0}),
    "a scale": ("CohereForCausalLM", SIZES | {"logit_scale": 0.25}),
    "a projection before it": ("OPTForCausalLM", {"vocab_size": 60, "hidden_size": 32, "ffn_dim": 48,
                               "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16,
                               "max_position_embeddings": 32, "dropout": 0.0}),
    "BLOOM": ("BloomForCausalLM", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "experts": ("MixtralForCausalLM", SIZES | {"num_local_experts": 4, "output_router_logits": True}),
    "a recurrent state": ("MambaForCausalLM", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}),
    "BERT": ("BertForMaskedLM", ENCODER),
    "DistilBERT": ("DistilBertForMaskedLM", {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
                   "dropout": 0.0, "attention_dropout": 0.0}),
    "T5": ("T5ForConditionalGeneration", T5 | TIED),
    "T5 1.1": ("T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "a bias behind it": ("BartForConditionalGeneration", SEQUENCES),
    "Marian": ("MarianMTModel", SEQUENCES),
}  # fmt: skip
"""Ways to make logits of what the last layer gives; the list is the test's, the loss knows none of them."""
PATTERNS = ("all", "answers", "few", "none")


def made(name):
    cls = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**MODELS[name][1])).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    for parameter in model.parameters():  # biases begin at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def batch_of(pattern):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=draw)
    labels = ids.clone()
    if pattern == "answers":
        labels[0, :7], labels[1, :4], labels[2, 9:] = -100, -100, -100
    if pattern in ("few", "none"):
        labels[:] = -100
    if pattern == "few":
        labels[0, 5] = 7
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def brute_force(model, batch, means):
    """The same loss of whole logits, a row at a time, by torch's own cross entropy."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = shifted_right(labels, model.config)
    elif not predicts_in_place(model):
        labels = shifted_left(labels)
    total = 0.0
    for logits, wanted in zip(model(**inputs).logits, labels, strict=True):
        summed = F.cross_entropy(logits.float(), wanted, ignore_index=-100, reduction="sum")
        total = total + (summed / max(int((wanted != -100).sum()), 1) if means else summed)
    return total


def gradients(model, loss):
    """Of 3 times the loss, as accumulation and mixed precision put a scale there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(3 * loss, trained, allow_unused=True)


def alike(found, wanted, tolerance):
    """Largest difference of two sets of gradients by the largest number of the second."""
    largest = max([float(w.abs().max()) for w in wanted if w is not None])
    for mine, theirs in zip(found, wanted, strict=True):
        mine = torch.zeros(()) if mine is None else mine
        theirs = torch.zeros(()) if theirs is None else theirs
        assert float((mine - theirs).abs().max()) <= tolerance * largest


@pytest.fixture
def never_whole(monkeypatch):
    """All logits are asked for by nobody, and chunks are smaller than a batch."""

    def refuse(self):
        raise AssertionError("all logits were computed")

    monkeypatch.setattr(deferred.Deferred, "computed", refuse)
    monkeypatch.setattr(cross_entropy, "positions_at_once", lambda vocabulary, device: 4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_whole_logits(never_whole, name, pattern):
    model, batch = made(name), batch_of(pattern)
    for means in (False, True):
        ours, theirs = TokenLoss(means)(model, batch), brute_force(model, batch, means)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        alike(gradients(model, ours), gradients(model, theirs), 2e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["a tied head", "a head with a bias", "a cap", "BERT", "T5"])
def test_half_precision_is_as_near_as_with_whole_logits(never_whole, name, kind):
    """Both beside fp32: what rounding costs does not grow."""
    model, batch = made(name), batch_of("answers")
    exact = brute_force(model, batch, False)
    wanted = gradients(model, exact)
    with torch.autocast("cpu", kind):
        ours, theirs = TokenLoss()(model, batch), brute_force(model, batch, False)
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs()) <= 2 * float((theirs - exact).abs()) + 1e-3 * float(exact)

    def away(loss):
        pairs = zip(gradients(model, loss), wanted, strict=True)
        return sum(float((mine - w).square().sum()) for mine, w in pairs if w is not None) ** 0.5

    assert away(ours) <= 1.1 * away(theirs)


def test_gradients_too_small_for_fp16_survive_when_the_loss_is_scaled(never_whole):
    head = torch.nn.Linear(1, 8, bias=False).half()
    head.weight.data = torch.tensor([[18.0]] + 7 * [[0.0]]).half()  # probabilities of 1.5e-8, which fp16 cannot hold
    with deferred.deferring(head):
        logits = head(torch.ones(1, 1, 1, dtype=torch.float16))
    (65536 * cross_entropy.summed_cross_entropy(logits, torch.tensor([[0]]))).backward()
    wanted = [65536 * float(torch.exp(torch.tensor(-18.0)))] * 7
    assert head.weight.grad[1:, 0].tolist() == pytest.approx(wanted, rel=1e-2)


def test_frozen_heads_and_frozen_bodies_get_no_gradient_and_the_others_theirs(never_whole):
    for freeze in ("lm_head", "model"):
        model, batch = made("a head with a bias"), batch_of("answers")
        model.get_submodule(freeze).requires_grad_(False)
        TokenLoss()(model, batch).backward()
        twin = made("a head with a bias")
        brute_force(twin, batch, False).backward()
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            if name.startswith(f"{freeze}."):
                assert mine.grad is None
            else:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept(never_whole):
    model, batch = made("a cap"), batch_of("all")
    with torch.no_grad():
        found = TokenLoss()(model, batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, TokenLoss()(model, batch).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_derivatives_of_gradients_are_refused_rather_than_wrong(never_whole, kind):
    model, batch = made("a head of its own").to(kind), batch_of("answers")
    with pytest.raises(RuntimeError, match="create_graph=False"):
        torch.autograd.grad(TokenLoss()(model, batch), model.lm_head.weight, create_graph=True)


# -- where logits are made otherwise, they are whole, and the loss is right --------------------------------------------


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + inputs[0][..., :1])


def with_peft(model):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def with_packed_head(model):
    class Packed(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    model.lm_head.__class__ = Packed


def with_another_head(model):
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, VOCABULARY))


def with_own_forward(model):
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(2 * x)


def with_more_behind(model, more):
    plain = model.forward

    def forward(**inputs):
        outputs = plain(**inputs)
        outputs.logits = more(outputs.logits)
        return outputs

    model.forward = forward


BEHIND = {
    "another position's": lambda z: z + z.roll(1, 1),
    "a factor a position": lambda z: z * torch.arange(11)[:, None],
    "a mean": lambda z: z - z.mean(-1, keepdim=True),
    "in place": lambda z: (z.mul_(2), z)[1],
    "a slice": lambda z: z[..., :VOCABULARY],
    "a product": lambda z: z @ torch.eye(VOCABULARY),
    "a learned factor": lambda z: z * torch.tensor(2.0, requires_grad=True),
}


@pytest.mark.parametrize("change", [with_hook, with_peft, with_packed_head, with_another_head, with_own_forward])
def test_a_head_that_is_no_plain_layer_computes_its_logits_itself(change):
    model, batch = made("a head of its own"), batch_of("answers")
    change(model)
    assert deferred.output_layer(model) is None
    ours, theirs = TokenLoss()(model, batch), brute_force(model, batch, False)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    alike(gradients(model, ours), gradients(model, theirs), 1e-6)


@pytest.mark.parametrize("behind", BEHIND)
def test_what_is_done_to_more_than_a_number_at_a_time_is_done_to_whole_logits(behind):
    model, batch = made("a head of its own"), batch_of("answers")
    with_more_behind(model, BEHIND[behind])
    ours, theirs = TokenLoss()(model, batch), brute_force(model, batch, False)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    alike(gradients(model, ours), gradients(model, theirs), 1e-6)


def test_a_learned_factor_of_what_stands_for_a_model_gets_its_gradient():
    model, batch = made("a head of its own"), batch_of("answers")
    factor = torch.tensor(0.7, requires_grad=True)

    class Warmed:
        module = model

        def __call__(self, **inputs):
            outputs = model(**inputs)
            outputs.logits = outputs.logits * factor
            return outputs

    (found,) = torch.autograd.grad(TokenLoss()(Warmed(), batch), factor)
    logits = model(input_ids=batch["input_ids"]).logits * factor
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(summed, factor)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, torch.ones(11)[:, None]])
def test_weights_that_a_model_has_for_one_call_are_those_of_the_loss_behind_it(factor):
    model, batch = made("a head with a bias"), batch_of("answers")
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}

    class Lent:
        module = model

        def __call__(self, **inputs):
            outputs = torch.func.functional_call(model, weights, (), inputs)
            outputs.logits = outputs.logits * factor
            return outputs

    head = weights["lm_head.weight"], weights["lm_head.bias"]
    ours = TokenLoss()(Lent(), batch)
    found = torch.autograd.grad(ours, head)
    logits = torch.func.functional_call(model, weights, (), {"input_ids": batch["input_ids"]}).logits
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    alike(found, torch.autograd.grad(theirs, head), 1e-6)


def test_a_compiled_model_is_left_to_its_compiler():
    model = made("a head of its own")
    assert deferred.output_layer(model) is model.lm_head
    model.compile()
    assert deferred.output_layer(model) is None


def test_a_model_comes_out_as_it_went_in():
    model = made("a head of its own")
    TokenLoss()(model, batch_of("all"))
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks
    assert type(model(input_ids=torch.tensor([[1, 2]])).logits) is torch.Tensor
    with pytest.raises(IndexError):
        TokenLoss()(model, {**batch_of("all"), "input_ids": torch.tensor([[VOCABULARY]])})
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks


# -- memory ------------------------------------------------------------------------------------------------------------


class Logits(TorchDispatchMode):
    """The most bytes that storages had together which hold a number for each token of the vocabulary, weights apart."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.known, self.now, self.most = weights, WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, found)
        return found

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if VOCABULARY not in tensor.shape[-1:] or storage.data_ptr() in self.weights or storage in self.known:
            return
        self.known[storage] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, size):
        self.now -= size


def most_logits(model, length):
    ids = torch.randint(3, VOCABULARY, (2, length))
    with Logits({p.data_ptr() for p in model.parameters()}) as seen:
        TokenLoss()(model, {"input_ids": ids, "labels": ids}).backward()
    return seen.most


@pytest.mark.parametrize("name", ["a head of its own", "a cap"])
def test_logits_do_not_grow_with_the_length(monkeypatch, name):
    monkeypatch.setattr(cross_entropy, "positions_at_once", lambda vocabulary, device: 8)
    model = made(name).train()
    short, long = most_logits(model, 16), most_logits(model, 128)
    assert 2 * 4 * 8 * VOCABULARY <= short == long <= 6 * 4 * 8 * VOCABULARY
    monkeypatch.setattr(deferred, "output_layer", lambda model: None)
    assert most_logits(model, 128) >= 2 * 4 * 2 * 128 * VOCABULARY
