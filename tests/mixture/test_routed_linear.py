"""The routed layer against a plain loop over experts in float64, and each expert against stock PEFT."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call

from dylora_moe import MoELoraConfig, RouterConfig, UsageError
from dylora_moe.base.structure import decoder_layers
from dylora_moe.mixture.dispatch import Dense, Gathered, Grouped, can_be_grouped, sparse_dispatch

from ..support.tiny import ARCHITECTURES, random_ids, tiny_base, tiny_mixture

TOLERANCE = 1e-5
PLAIN = {"lora_dropout": 0.0}
MIXED = {
    "llama": [
        MoELoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **PLAIN),
        MoELoraConfig(r=5, lora_alpha=3, target_modules="all-linear", **PLAIN),
        MoELoraConfig(r=3, use_rslora=True, target_modules=["down_proj", "q_proj"], **PLAIN),
    ],
    "gpt2": [
        MoELoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], **PLAIN),
        MoELoraConfig(r=5, lora_alpha=3, target_modules="all-linear", **PLAIN),
        MoELoraConfig(r=3, use_rslora=True, target_modules=["c_fc", "c_attn"], **PLAIN),
    ],
}


def loop_logits(kind, model, ids, top_k=None, experts=None):
    """The definition, written out: a float64 base, hooks that add one expert after the other."""
    base = tiny_base(kind).double()
    experts = range(model.num_experts) if experts is None else experts
    tensors = [{k: v.detach().double() for k, v in model.expert_tensors(e).items()} for e in range(model.num_experts)]
    config = [c.lora_alpha / (c.r**0.5 if c.use_rslora else c.r) for c in model.expert_configs]
    router = {name: p.detach().double() for name, p in model.router.named_parameters()}
    settings, embed = model.router.config, base.get_input_embeddings()
    weights = {}
    for batch, row in enumerate(ids.tolist()):
        sums, count = torch.zeros(model.num_experts, dtype=torch.float64), 0.0
        for t, token in enumerate(row):
            if t > 0:
                x = embed(torch.tensor(token)).detach()
                x = x / (x.square().mean() + 1e-6).sqrt()
                sums = settings.decay * sums + router["gate.weight"] @ x + router["gate.bias"]
                count = settings.decay * count + 1
            found = sums / (count + settings.prior_tokens) / settings.temperature + router["prior"]
            logits = {e: float(found[e]) for e in experts}
            kept = sorted(logits, key=logits.get, reverse=True)[: top_k or len(logits)]
            total = sum(torch.tensor(logits[e]).double().exp() for e in kept)
            for e in range(model.num_experts):
                weights[batch, t, e] = torch.tensor(logits[e]).double().exp() / total if e in kept else 0.0

    def add(name):
        def hook(module, args, out):
            out = out.clone()
            for e in range(model.num_experts):
                a = tensors[e].get(f"base_model.model.{name}.lora_A.weight")
                if a is None:
                    continue
                b = tensors[e][f"base_model.model.{name}.lora_B.weight"]
                for batch in range(out.shape[0]):
                    for t in range(out.shape[1]):
                        out[batch, t] += weights[batch, t, e] * config[e] * (b @ (a @ args[0][batch, t]))
            return out

        return hook

    names = {key.removeprefix("base_model.model.").split(".lora_")[0] for t in tensors for key in t}
    for name, module in base.named_modules():
        if name in names:
            module.register_forward_hook(add(name))
    with torch.no_grad():
        return base(ids, use_cache=False).logits


def difference(a, b):
    return float((a.detach().double() - b.detach().double()).abs().max())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dense_routing_is_the_loop_over_experts(kind, grad):
    model, ids = tiny_mixture(kind), random_ids(2, 7)
    with torch.set_grad_enabled(grad):
        assert difference(model(ids).logits, loop_logits(kind, model, ids)) <= TOLERANCE


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sparse_routing_is_the_loop_over_the_top_experts(kind, grad):
    model, ids = tiny_mixture(kind, 4, router=RouterConfig(temperature=0.7)), random_ids(2, 7)
    dense = model(ids).logits
    model.mark_mature()
    with torch.set_grad_enabled(grad):
        sparse = model(ids).logits
    assert difference(sparse, loop_logits(kind, model, ids, top_k=2)) <= TOLERANCE
    assert difference(sparse, dense) > 1e-3


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("kind", MIXED)
def test_experts_of_different_ranks_targets_and_scalings(kind, top_k):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = tiny_mixture(kind, MIXED[kind], router=RouterConfig(top_k=top_k or 3))
    model.mark_mature()
    ids = random_ids(2, 6)
    for _ in range(3):  # the third time with what was kept
        with torch.no_grad():
            assert difference(model(ids).logits, loop_logits(kind, model, ids, top_k=top_k)) <= TOLERANCE
    assert difference(model(ids).logits, loop_logits(kind, model, ids, top_k=top_k)) <= TOLERANCE


@pytest.fixture
def eager_dispatch(monkeypatch):
    """Tokens are dispatched however few there are; what was chosen."""
    made, make = [], sparse_dispatch
    for name in ("PLACE_COST", "DISPATCH_COST", "EXPERTS_PER_CHOICE"):
        monkeypatch.setattr(f"dylora_moe.mixture.dispatch.{name}", 1)
    monkeypatch.setattr(
        "dylora_moe.mixture.dispatch.sparse_dispatch", lambda *args: made.append(make(*args)) or made[-1]
    )
    return made


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("skew", [0.0, 30.0])
@pytest.mark.parametrize("r", [4, 8])
def test_dispatched_tokens_give_the_loop(top_k, skew, r, eager_dispatch):
    """Many experts, evenly and unevenly wanted: the dispatch is taken, and is the loop.

    Those of few tokens are fetched."""
    lora = MoELoraConfig(r=r, lora_alpha=8, lora_dropout=0.0)
    model = tiny_mixture("llama", 12, router=RouterConfig(top_k=top_k), lora=lora)
    model.mark_mature()
    ids = random_ids(2, 9)
    with torch.no_grad():
        model.router.gate.weight[3] *= 1 + skew  # half of the tokens want it very much
        for tokens, kind in ((ids, Grouped), (ids[:1, :1], Gathered), (ids[:1, :3], Gathered)):
            eager_dispatch.clear()
            logits = [model(tokens).logits for _ in range(3)]
            assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2]), "what is kept has no say"
            expected = loop_logits("llama", model, tokens, top_k=top_k)
            assert difference(logits[0], expected) <= TOLERANCE * (1 + skew)
            assert [type(plan) for plan in eager_dispatch] == [kind] * 3, "one for each pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 9), (2, 1)])
def test_dispatch_on_a_base_of_another_dtype(dtype, shape, eager_dispatch):
    model, ids = tiny_mixture("llama", 16, dtype=dtype), random_ids(*shape)
    with torch.no_grad():
        dense = model(ids).logits
        model.mark_mature()
        sparse = model(ids).logits
        eager_dispatch.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dylora_moe.mixture.dispatch.sparse_dispatch", lambda *args: None)
            assert difference(sparse, model(ids).logits) <= 0.05
    assert difference(sparse, dense) > 0.05


@pytest.mark.parametrize("shape", [(2, 9), (2, 1), (1, 1)])
def test_a_wider_base_is_not_rounded(shape):
    model, ids = tiny_mixture("llama", 16, dtype=torch.float64), random_ids(*shape)
    model.mark_mature()
    for _, layer in model.routed_layers():
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)
    with torch.no_grad():
        found = model(ids).logits
        with model.disable_experts():
            assert torch.equal(found, model(ids).logits)


def test_what_is_dispatched():
    def plan(tokens, experts, top_k=2, r=16):
        weights, index = torch.rand(tokens, experts).topk(top_k)
        return type(sparse_dispatch(index, weights, experts, r)).__name__

    assert plan(512, 64) == plan(256, 16) == "Grouped"
    assert plan(512, 4) == plan(64, 16) == plan(4, 16) == "NoneType"  # the sum over all is as cheap
    assert plan(1, 64) == plan(8, 64) == plan(1, 8) == "Gathered"
    assert plan(9, 64) == plan(1, 4) == "NoneType"
    assert plan(512, 64, top_k=63) == "NoneType"


def test_matrices_that_cannot_be_grouped_are_summed_over(eager_dispatch):
    """A grouped matmul takes rows of whole 16 bytes only."""
    assert can_be_grouped(torch.float32, 8, 4)
    assert not can_be_grouped(torch.float32, 8, 6)
    assert not can_be_grouped(torch.float64, 8, 8)
    ids = random_ids(2, 9)
    for r, dtype, grouped in ((4, torch.float32, 3), (3, torch.float32, 0), (4, torch.float64, 0)):
        eager_dispatch.clear()
        lora = MoELoraConfig(r=r, lora_alpha=8, lora_dropout=0.0)
        model = tiny_mixture("llama", 12, lora=lora).to(dtype)
        model.mark_mature()
        with torch.no_grad():
            logits = [model(ids).logits for _ in range(3)][-1]
        assert logits.dtype == dtype and len(eager_dispatch) == grouped
        assert difference(logits, loop_logits("llama", model, ids, top_k=2)) <= TOLERANCE


def test_a_dispatch_covers_every_choice_once():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    logits[:, 7] += 9
    logits[:, 12:] -= 99
    weights, index = logits.topk(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dylora_moe.mixture.dispatch.PLACE_COST", 1)
        patch.setattr("dylora_moe.mixture.dispatch.DISPATCH_COST", 1)
        found = sparse_dispatch(index, weights, 20, 16)
    total, begin = torch.zeros(50, 20), 0
    for expert, end in enumerate(found.ends.tolist()):
        for token in found.tokens[begin:end].tolist():
            total[token, expert] += 1
        begin = end
    assert torch.equal(total, torch.zeros(50, 20).scatter(1, index, 1.0))
    order = torch.arange(100) // 2
    assert torch.equal(found.tokens[found.places], order)
    assert torch.equal(found.gate[found.places].view(50, 2), weights)
    assert torch.equal(found.rows.view(50, 2, 16), index.unsqueeze(-1) * 16 + torch.arange(16))
    assert torch.equal(found.starts, torch.arange(50) * 32)


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_hook_has_seen_of_the_base_layer_stays(grad):
    """The sum is added in place only where nobody else holds the base layer's result."""
    model, ids, seen = tiny_mixture("llama", 2), random_ids(2, 9), []
    layer = decoder_layers(model.base)[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
    with torch.set_grad_enabled(grad):
        model(ids)
    assert torch.equal(*seen[0])


def test_one_gradient_for_each_sequence():
    """As torch.func's vmap and grad compute them."""
    model, ids = tiny_mixture("llama", 3), random_ids(3, 5)
    tensors = {name: p.detach() for name, p in model.trained_parameters().items()}

    def loss(tensors, row):
        return functional_call(model, tensors, (row[None],), {"labels": row[None]}).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors, ids)
    for index, row in enumerate(ids):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.trained_parameters().items():
            assert difference(each[name][index], parameter.grad) <= TOLERANCE


class SavesItsOutput(torch.autograd.Function):
    """A linear layer whose backward pass needs what the forward pass returned, as that of a quantized one may."""

    @staticmethod
    def forward(ctx, x, weight):
        out = (x @ weight.t()).exp()
        ctx.save_for_backward(weight, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, out = ctx.saved_tensors
        return (grad * out) @ weight, None


class ExponentialLinear(torch.nn.Linear):
    def forward(self, x):
        return SavesItsOutput.apply(x, self.weight)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_adding_in_place_changes_no_gradient(kind, other, monkeypatch):
    """Nor does it where the base layer needs its result again."""
    model, ids, found = tiny_mixture(kind, 3), random_ids(2, 7), []
    if other:
        for _, layer in model.routed_layers():
            if type(layer.base_layer) is torch.nn.Linear:
                layer.base_layer.__class__ = ExponentialLinear
    for never in (False, True):
        if never:
            monkeypatch.setattr("dylora_moe.mixture.routed_linear.RoutedLinear._owns", lambda *args: False)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        found.append([out.logits, *(p.grad for p in model.trained_parameters().values())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(grad.abs().max() > 0 for grad in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_stock_peft_computes_the_same_with_each_expert(kind, dtype, tmp_path):
    model, ids = tiny_mixture(kind, 2, dtype=dtype), random_ids(2, 8)
    for index in range(2):
        model.export_expert(index, tmp_path / str(index))
        stock = PeftModel.from_pretrained(tiny_base(kind, dtype=dtype), tmp_path / str(index)).eval()
        assert not any("Routed" in type(module).__name__ for module in stock.modules())
        with torch.no_grad():
            ours, theirs = model(ids, expert=index).logits, stock(input_ids=ids).logits
        assert ours.dtype == theirs.dtype == dtype
        assert difference(ours, theirs) == 0
        assert difference(ours, model(ids, expert=1 - index).logits) > 1e-3


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "opt"])  # OPT flattens the batch before its second block
def test_one_expert_for_each_row(kind):
    model, ids = tiny_mixture(kind, 3), random_ids(1, 8)
    with torch.no_grad():
        rows = model(ids.expand(4, -1), expert=[2, 0, 1, 2]).logits
        alone = torch.cat([model(ids, expert=expert).logits for expert in (2, 0, 1, 2)])
        assert difference(rows, alone) <= TOLERANCE and difference(rows[0], rows[1]) > 1e-3
        if kind != "opt":  # which PEFT refuses
            names = ["expert_2", "expert_0", "expert_1", "expert_2"]
            theirs = model.peft_model(input_ids=ids.expand(4, -1), adapter_names=names).logits
            assert difference(rows, theirs) == 0


def test_rows_with_experts_of_different_shapes():
    model, ids = tiny_mixture("llama", MIXED["llama"]), random_ids(3, 8)
    with torch.no_grad():
        rows = model(ids, expert=range(3)).logits
        for index in range(3):
            assert difference(rows[index], model(ids[index : index + 1], expert=index).logits[0]) <= TOLERANCE


def test_stock_peft_computes_the_same_with_experts_of_different_shapes(tmp_path):
    model, ids = tiny_mixture("llama", MIXED["llama"]), random_ids(2, 8)
    for index in range(3):
        model.export_expert(index, tmp_path / str(index))
        stock = PeftModel.from_pretrained(tiny_base(), tmp_path / str(index)).eval()
        assert difference(model(ids, expert=index).logits, stock(input_ids=ids).logits) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_experts_are_float32_on_any_base(dtype):
    model, ids = tiny_mixture("llama", 4, dtype=dtype), random_ids(2, 8)
    assert {p.dtype for p in model.trained_parameters().values()} == {torch.float32}
    reference = loop_logits("llama", model, ids)
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, TOLERANCE)
    assert model(ids).logits.dtype == dtype
    assert difference(model(ids).logits, reference) <= tolerance
    model.train()
    model(ids, labels=ids).loss.backward()
    assert {p.grad.dtype for p in model.trained_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("experts", [1, 2, 11])
def test_any_number_of_experts_and_each_is_itself(experts):
    """expert_1 and expert_10 never mix."""
    model, ids = tiny_mixture("llama", experts), random_ids(1, 6)
    assert difference(model(ids).logits, loop_logits("llama", model, ids)) <= TOLERANCE
    alone = [model(ids, expert=e).logits for e in range(experts)]
    for e in range(experts):
        spoiled = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in spoiled.expert_tensors(e).values():
                tensor.mul_(1.5)
        changed = [not torch.equal(spoiled(ids, expert=i).logits, alone[i]) for i in range(experts)]
        assert changed == [i == e for i in range(experts)]


# ---- what is kept in evaluation ----


@torch.no_grad()
def changed_after(model, ids, change):
    before = [model(ids).logits for _ in range(3)][-1]
    change(model)
    return not torch.equal(model(ids).logits, before)


def first_tensors(model):
    return [next(iter(model.expert_tensors(e).values())) for e in range(model.num_experts)]


def all_tensors(model):
    """Of the experts; the router's would change the output by themselves."""
    return [tensor for e in range(model.num_experts) for tensor in model.expert_tensors(e).values()]


def in_place(model):
    for tensor in first_tensors(model):
        tensor.mul_(2)


def new_data(model):
    for tensor in first_tensors(model):
        tensor.data = tensor.data * 2


def new_parameter(model):
    layer = next(layer for _, layer in model.routed_layers())
    for linear in layer.lora_A.values():
        linear.weight = torch.nn.Parameter(linear.weight * 2)


def data_then_eval(model):
    for tensor in first_tensors(model):
        tensor.data.mul_(2)
    model.eval()


def scaling(model):
    for _, layer in model.routed_layers():
        for name in list(layer.scaling):
            layer.set_scale(name, 3.0)


def optimizer_step(model):
    with torch.enable_grad():
        ids = random_ids(1, 4)
        model(ids, labels=ids).loss.backward()
    torch.optim.SGD(all_tensors(model), lr=0.5).step()


def fused_step(model):
    """The gradients are there since before the evaluation."""
    for parameter in all_tensors(model):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(all_tensors(model), lr=0.5, fused=True).step()


def data_then_gradients(model):
    for tensor in first_tensors(model):
        tensor.data.mul_(2)
    with torch.enable_grad():
        model(random_ids(1, 4), expert=1)


CHANGES = [in_place, new_data, new_parameter, data_then_eval, data_then_gradients, scaling, optimizer_step, fused_step]


@pytest.mark.parametrize("mature", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_kept_is_let_go_when_an_expert_changes(change, mature):
    model = tiny_mixture("llama", 12)
    if mature:
        model.mark_mature()
    assert changed_after(model, random_ids(2, 8), change)


def test_evaluation_keeps_nothing_after_one_pass_and_training_nothing_at_all():
    model, ids = tiny_mixture(), random_ids(1, 4)

    def kept():
        unchanged = model._watch._unchanged
        stacks = [] if unchanged is None else unchanged.stacks.values()
        return [tensor for stack in stacks for tensor in stack._kept.values()]

    with torch.no_grad():
        model(ids)
        assert not kept()
        model(ids)
        assert len(kept()) == 3 * (2 + 4), "in 3 decoder layers the A of q, k and v as one, that of o, and 4 B"
    model(ids)
    assert not kept()


def test_b_is_laid_out_the_same_whether_it_is_kept_or_not(monkeypatch):
    """Some processors add up a transposed matrix in another order."""
    model, ids, seen, combine = tiny_mixture("llama", 3), random_ids(2, 6), [], Dense.combine
    monkeypatch.setattr(
        Dense,
        "combine",
        lambda self, total, hidden, b, in_place: seen.append(b.stride()) or combine(self, total, hidden, b, in_place),
    )
    with torch.no_grad():
        for _ in range(3):
            model(ids)
    assert len(seen) == 3 * 3 * 4 and seen[:12] == seen[12:24] == seen[24:]


def test_a_layer_that_sees_other_tokens_than_the_router_is_an_error():
    model = tiny_mixture()
    layer = decoder_layers(model.base)[0]
    layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: (args[0][:, :2],))
    with pytest.raises(UsageError, match="was given 2 tokens, the router saw 5"):
        model(random_ids(1, 5))


def test_bare_base_and_forced_experts_do_not_route():
    model, ids = tiny_mixture(), random_ids(1, 5)
    with model.disable_experts():
        assert torch.equal(model(ids).logits, tiny_base()(ids).logits)
    with model.expert(1):
        assert torch.equal(model(ids).logits, model(ids, expert=1).logits)
        assert torch.equal(model(ids, expert=0).logits, model.base(ids).logits) is False
    assert difference(model(ids).logits, model(ids, expert=1).logits) > 1e-3


# ---- layers that read the same input ----


def a_products(model, ids, monkeypatch):
    """How many layers each product with A is for, in a forward pass."""
    found, hidden = [], Dense.hidden

    def count(self, x, a):
        parts = hidden(self, x, a)
        found.append(len(parts))
        return parts

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Dense, "hidden", count)
        model(ids)
    return found


def test_layers_that_read_the_same_have_one_product_with_a(monkeypatch):
    model, ids = tiny_mixture("llama", lora=MoELoraConfig(r=4, target_modules="all-linear")), random_ids(2, 6)
    assert a_products(model, ids, monkeypatch) == [3, 1, 2, 1] * 3, "q k v, o, gate and up, down"


def test_layers_whose_experts_differ_share_no_product(monkeypatch):
    model, ids = tiny_mixture("llama", MIXED["llama"]), random_ids(2, 6)  # q has three experts, v two, k one
    assert a_products(model, ids, monkeypatch) == [1, 1, 1, 1, 2, 1] * 3


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_that_is_given_an_input_of_its_own_computes_with_that(grad, top_k):
    """By their names q, k and v read the same; a base may have it otherwise."""
    model, ids = tiny_mixture("llama", 4, router=RouterConfig(top_k=top_k or 4)), random_ids(2, 6)
    model.mark_mature()
    attention, seen = decoder_layers(model.base)[1].self_attn, {}
    attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        layer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            model(ids)
        together = dict(seen)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.sharing = (layer,)
        model(ids)
    assert torch.equal(together["k_proj"][0], 2 * together["q_proj"][0])
    for name in seen:
        assert difference(together[name][1], seen[name][1]) <= TOLERANCE
    bare = {name: getattr(attention, name).base_layer(seen[name][0]) for name in seen}
    assert all(difference(bare[name], seen[name][1]) > 1e-3 for name in seen)


def test_a_layer_that_is_run_by_itself_is_refused():
    """Outside of a forward pass there is no route, and PEFT would add up all experts."""
    model = tiny_mixture("llama", 3)
    with pytest.raises(UsageError, match="inside the model's forward"):
        decoder_layers(model.base)[1].self_attn.q_proj(torch.randn(2, 9, 32))
