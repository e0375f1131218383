"""Replacing modules: every registration, nothing else changed, and back again."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

from lightning_efficient.surgery.replace import reinstate_modules, replace_modules, restore_modules


class Affine(nn.Module):
    """Shares nothing with what it replaces; parameters named like a LayerNorm's, and one more."""

    def __init__(self, dim=4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return (x - self.mean) * self.weight * self.gain + self.bias


class Wrap(nn.Module):
    """Holds the module it replaces."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Net(nn.Module):
    """Tied embedding and head, a module under two names, modules in every kind of container."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.seq = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
        self.named = nn.ModuleDict({"final": nn.LayerNorm(4)})
        self.alias = self.named["final"]
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.alias(self.seq(x)))


TOKENS = torch.arange(10).reshape(2, 5)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def fingerprint(model):
    """All that surgery could change: structure, identities, values, flags, hooks."""
    return [
        (
            name,
            id(module),
            module.training,
            {key: (id(p), p.requires_grad, p.device, p.dtype, p.tolist()) for key, p in module.named_parameters()},
            {key: (id(b), b.dtype, b.tolist()) for key, b in module.named_buffers()},
            sorted(vars(module)),
            {key: (id(value), list(value.items())) for key, value in vars(module).items() if key.endswith("hooks")},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


# --- every registration
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks.1.norm", "seq.0", "named.final", "alias", "blocks.0"])
def test_replaces_in_every_container_and_back_exactly(net, name):
    before, output = fingerprint(net), net(TOKENS)
    old, new = net.get_submodule(name), nn.Identity()
    names = [n for n, m in net.named_modules(remove_duplicate=False) if m is old]
    swaps = replace_modules(net, {name: new})
    assert swaps == {name: (old, new)}
    assert [n for n, m in net.named_modules(remove_duplicate=False) if m is new] == names
    assert old not in set(net.modules())
    restore_modules(net, swaps)
    assert fingerprint(net) == before
    torch.testing.assert_close(net(TOKENS), output, rtol=0, atol=0)


def test_a_module_with_two_names_is_replaced_under_both(net):
    new = Affine()
    replace_modules(net, {"alias": new})
    assert net.alias is new
    assert net.named["final"] is new
    assert "alias.gain" in net.state_dict()
    assert "named.final.gain" in net.state_dict()


def test_the_same_module_under_two_parents(net):
    net.blocks[1].norm = net.blocks[0].norm
    new = Affine()
    swaps = replace_modules(net, {"blocks.0.norm": new})
    assert net.blocks[0].norm is net.blocks[1].norm is new
    restore_modules(net, swaps)
    assert isinstance(net.blocks[0].norm, nn.LayerNorm)
    assert net.blocks[1].norm is net.blocks[0].norm


def test_plain_lists_dicts_tuples_and_attributes_are_followed(net):
    norms = [block.norm for block in net.blocks]
    net.norm_list = list(norms)
    net.norm_dict = {"first": norms[0], "other": 3}
    net.norm_tuple = (norms[0], "kept")
    object.__setattr__(net, "hidden", norms[0])
    the_list = net.norm_list
    new = Affine()
    swaps = replace_modules(net, {"blocks.0.norm": new})
    assert net.norm_list is the_list
    assert net.norm_list == [new, norms[1]]
    assert net.norm_dict == {"first": new, "other": 3}
    assert net.norm_tuple == (new, "kept")
    assert net.hidden is new
    restore_modules(net, swaps)
    assert (net.norm_list, net.norm_tuple, net.hidden) == (norms, (norms[0], "kept"), norms[0])
    assert net.norm_dict == {"first": norms[0], "other": 3}


def test_what_the_old_module_holds_leaves_with_it_and_comes_back_as_it_was(net):
    old = net.blocks[0]
    object.__setattr__(old.fc, "parent", old)  # a way to look up that some models have
    before = fingerprint(net)
    swaps = replace_modules(net, {"blocks.0": nn.Identity()})
    assert old.fc.parent is old
    restore_modules(net, swaps)
    assert old.fc.parent is old
    assert fingerprint(net) == before


def test_several_at_once_and_nothing_at_all(net):
    new = {f"blocks.{i}.norm": Affine() for i in range(2)}
    swaps = replace_modules(net, new)
    assert {name: pair[1] for name, pair in swaps.items()} == new
    assert replace_modules(net, {}) == {}


# --- identity, tying, copies
# ------------------------------------------------------------------------------------


def test_tied_weights_stay_tied(net):
    new = nn.Linear(4, 10, bias=False)
    new.weight = net.head.weight
    replace_modules(net.double(), {"head": new})
    assert net.head is new
    assert net.head.weight is net.embed.weight
    assert net.head.weight.dtype == torch.float64


def test_parameters_taken_over_keep_their_identity_and_precision(net):
    net.bfloat16()
    net.seq[0].float()  # a float32 norm in a bfloat16 model: what is shared must not be cast to its neighbours' dtype
    old = net.seq[0]
    new = Affine()
    new.weight, new.bias = old.weight, old.bias
    replace_modules(net, {"seq.0": new})
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert {p.dtype for p in new.parameters()} == {torch.float32}


def test_a_shared_tensor_keeps_its_own_precision(net):
    old = net.seq[0]
    old.weight = nn.Parameter(old.weight.detach().bfloat16())
    new = Affine()
    new.bias = old.bias  # float32 next to a bfloat16 weight
    replace_modules(net, {"seq.0": new})
    assert (new.weight.dtype, new.bias.dtype) == (torch.bfloat16, torch.float32)


def test_a_deepcopy_of_a_changed_model_is_independent(net):
    fired = []
    net.seq[0].register_forward_hook(lambda module, args, output: fired.append(module))
    swaps = replace_modules(net, {"seq.0": Affine(), "alias": Affine()})
    new, expected = swaps["seq.0"][1], net(TOKENS).detach()
    twin = copy.deepcopy(net)
    assert twin.alias is twin.named["final"]
    assert not set(map(id, twin.modules())) & set(map(id, net.modules()))
    assert not set(map(id, twin.parameters())) & set(map(id, net.parameters()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(net(TOKENS), expected, rtol=0, atol=0)
    restore_modules(net, swaps)
    twin(TOKENS)
    assert type(twin.seq[0]) is Affine
    assert fired == [new, new, twin.seq[0]]


def test_a_changed_model_pickles(net, tmp_path):
    replace_modules(net, {"seq.0": Affine()})
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    torch.testing.assert_close(loaded(TOKENS), net(TOKENS), rtol=0, atol=0)


def test_the_new_module_may_hold_the_old_one(net):
    before, old = fingerprint(net), net.seq[0]
    expected = F.linear(net.alias(torch.relu(2 * old(_body(net)))), net.head.weight)
    swaps = replace_modules(net, {"seq.0": Wrap(old)})
    torch.testing.assert_close(net(TOKENS), expected)
    restore_modules(net, swaps)
    assert fingerprint(net) == before


def _body(net):
    x = net.embed(TOKENS)
    for block in net.blocks:
        x = block(x)
    return x


# --- device, dtype, flags
# ---------------------------------------------------------------------------------------


def test_the_new_module_gets_the_old_ones_dtype_and_keeps_parameter_identity(net):
    net.bfloat16()
    new = Affine()
    ids = [id(p) for p in new.parameters()]
    replace_modules(net, {"seq.0": new})
    assert [id(p) for p in new.parameters()] == ids
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.mean.dtype == torch.bfloat16
    assert new.count.dtype == torch.long
    assert net(TOKENS).dtype == torch.bfloat16


def test_a_module_without_tensors_takes_dtype_from_its_parent(net):
    net.seq.append(nn.Identity())
    net.double()
    new = Affine()
    replace_modules(net, {"seq.2": new})
    assert new.weight.dtype == torch.float64


def test_8_bit_weights_do_not_make_8_bit_norms(net):
    net.seq[0].weight = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    new = Affine()
    replace_modules(net, {"seq.0": new})
    assert new.gain.dtype == torch.float32


def test_a_whole_model_on_the_meta_device():
    with torch.device("meta"):
        net, new = Net(), Affine()
    replace_modules(net, {"seq.0": new})
    assert net.seq[0] is new


def test_training_flags_follow_module_by_module(net):
    net.blocks[0].fc.eval()
    new = copy.deepcopy(net.blocks[0]).train()
    new.extra = nn.Dropout().eval()
    swaps = replace_modules(net, {"blocks.0": new})
    assert (new.training, new.norm.training, new.fc.training, new.extra.training) == (True, True, False, True)
    net.eval()
    restore_modules(net, swaps)
    assert not any(module.training for module in net.modules())


def test_flags_inside_a_wrapped_old_module_are_left_alone(net):
    old = net.blocks[0]
    old.fc.eval()
    wrap = Wrap(old)
    wrap.training = False
    replace_modules(net, {"blocks.0": wrap})
    assert wrap.training
    assert not old.fc.training
    assert old.norm.training


def test_requires_grad_of_same_named_parameters_follows_both_ways(net):
    net.seq[0].bias.requires_grad_(False)
    new = Affine()
    swaps = replace_modules(net, {"seq.0": new})
    assert {name: p.requires_grad for name, p in new.named_parameters()} == {
        "weight": True,
        "bias": False,
        "gain": True,
    }
    new.weight.requires_grad_(False)
    restore_modules(net, swaps)
    assert not net.seq[0].weight.requires_grad


# --- hooks
# ------------------------------------------------------------------------------------------------------


def test_all_kinds_of_hooks_fire_on_the_new_module_and_again_on_the_old(net):
    old, fired = net.seq[0], []
    note = lambda kind: lambda module, *rest, **kw: fired.append((kind, module))  # noqa: E731
    old.register_forward_pre_hook(note("pre"))
    old.register_forward_pre_hook(note("pre_kwargs"), with_kwargs=True)
    old.register_forward_hook(note("forward"))
    old.register_forward_hook(note("forward_kwargs"), with_kwargs=True, always_call=True)
    old.register_full_backward_pre_hook(note("backward_pre"))
    old.register_full_backward_hook(note("backward"))
    old.register_state_dict_pre_hook(note("state_pre"))
    old.register_state_dict_post_hook(note("state_post"))
    old.register_load_state_dict_pre_hook(note("load_pre"))
    old.register_load_state_dict_post_hook(note("load_post"))
    kinds = ["pre", "pre_kwargs", "forward", "forward_kwargs", "backward_pre", "backward"]
    kinds += ["state_pre", "state_post", "load_pre", "load_post"]

    def exercise():
        fired.clear()
        net(TOKENS).sum().backward()
        net.load_state_dict(net.state_dict())
        return list(fired)

    assert exercise() == [(kind, old) for kind in kinds]
    before = fingerprint(net)
    new = Wrap(old)
    swaps = replace_modules(net, {"seq.0": new})
    assert exercise() == [(kind, new) for kind in kinds]  # once each, although the old module runs inside
    restore_modules(net, swaps)
    assert exercise() == [(kind, old) for kind in kinds]
    assert fingerprint(net) == before


def test_handles_taken_before_the_swap_still_remove_the_hook(net):
    fired = []
    handle = net.seq[0].register_forward_hook(lambda *args, **kw: fired.append(1), with_kwargs=True)
    swaps = replace_modules(net, {"seq.0": Affine()})
    net(TOKENS)
    assert fired == [1]
    handle.remove()
    net(TOKENS)
    restore_modules(net, swaps)
    net(TOKENS)
    assert fired == [1]


def test_hooks_the_new_module_registered_itself_stay_with_it(net):
    fired = []
    net.seq[0].register_forward_hook(lambda module, *_: fired.append(("user", type(module))))
    new = Affine()
    new.register_forward_hook(lambda module, *_: fired.append(("own", type(module))))
    swaps = replace_modules(net, {"seq.0": new})
    net(TOKENS)
    assert fired == [("user", Affine), ("own", Affine)]
    for _ in range(2):
        fired.clear()
        restore_modules(net, swaps)
        net(TOKENS)
        assert fired == [("user", nn.LayerNorm)]
        fired.clear()
        new(torch.ones(4))
        assert fired == [("own", Affine)]
        fired.clear()
        reinstate_modules(net, swaps)
        net(TOKENS)
        assert fired == [("user", Affine), ("own", Affine)]


def test_a_hook_registered_while_swapped_goes_back_with_the_others(net):
    fired = []
    swaps = replace_modules(net, {"seq.0": Affine()})
    net.seq[0].register_forward_hook(lambda module, *_: fired.append(type(module)))
    restore_modules(net, swaps)
    net(TOKENS)
    assert fired == [nn.LayerNorm]


def test_hooks_of_a_copy_do_not_fire_twice(net):
    fired = []
    net.seq[0].register_forward_hook(lambda module, *_: fired.append(module))
    old, new = net.seq[0], copy.deepcopy(net.seq[0])
    swaps = replace_modules(net, {"seq.0": new})
    net(TOKENS)
    assert fired == [new]
    restore_modules(net, swaps)
    net(TOKENS)
    assert fired == [new, old]


def test_backward_hooks_of_two_kinds_are_refused(net):
    net.seq[0].register_full_backward_hook(lambda *_: None)
    new = Affine()
    new.register_backward_hook(lambda *_: None)
    before = fingerprint(net)
    with pytest.raises(ValueError, match="backward hooks"):
        replace_modules(net, {"seq.0": new})
    assert fingerprint(net) == before


# --- wrappers
# ---------------------------------------------------------------------------------------------------


def test_names_inside_wrappers(net):
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    wrapped = torch.compile(net, backend="eager")
    new = {f"blocks.{i}.norm": Affine() for i in range(2)}
    swaps = replace_modules(wrapped, new)
    assert set(new.values()) <= set(wrapped.modules())
    restore_modules(wrapped, swaps)
    assert not set(new.values()) & set(wrapped.modules())


def test_a_target_that_is_itself_compiled_runs_the_new_module(net):
    net.seq[0] = torch.compile(net.seq[0], backend="eager")
    x = torch.randn(3, 4)
    expected = net.seq[0](x)
    swaps = replace_modules(net, {"seq.0": nn.Identity()})
    torch.testing.assert_close(net.seq[0](x), x, rtol=0, atol=0)
    restore_modules(net, swaps)
    torch.testing.assert_close(net.seq[0](x), expected)


# --- errors
# -----------------------------------------------------------------------------------------------------


def meta_norm():
    with torch.device("meta"):
        return Affine()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda net: {"seq.0": nn.Identity(), "blocks.0.nrom": nn.Identity()},
            ValueError,
            "close names.*norm",
        ),
        (lambda net: {"seq.0": nn.Identity(), "qqqq": nn.Identity()}, ValueError, "no module 'qqqq'"),
        (lambda net: {"seq.0": nn.Identity(), "": nn.Identity()}, ValueError, "The model itself"),
        (lambda net: {"seq.0": nn.Identity(), "seq.1": torch.relu}, TypeError, "expected an nn.Module"),
        (lambda net: {"seq.0": net.head}, ValueError, "already part of the model"),
        (lambda net: {"seq.0": net.seq[0]}, ValueError, "already part of the model"),
        (
            lambda net: {"alias": nn.Identity(), "named.final": nn.Identity()},
            ValueError,
            "are the same module",
        ),
        (
            lambda net: dict.fromkeys(("seq.0", "alias"), nn.Identity()),
            ValueError,
            "given the same new module",
        ),
        (
            lambda net: {"blocks.0": nn.Identity(), "blocks.0.fc": nn.Identity()},
            ValueError,
            "lies inside 'blocks.0'",
        ),
        (
            lambda net: {"seq.1": nn.Identity(), "seq.0": meta_norm()},
            ValueError,
            "the new module is on the meta device",
        ),
    ],
)
def test_everything_is_checked_before_anything_changes(net, make, error, text):
    net.bfloat16()
    before, new = fingerprint(net), make(net)
    with pytest.raises(error, match=text):
        replace_modules(net, new)
    assert fingerprint(net) == before


def test_a_new_module_with_data_does_not_go_into_a_meta_model():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match="Materialise the model first"):
        replace_modules(net, {"seq.0": Affine()})
    assert isinstance(net.seq[0], nn.LayerNorm)


def test_restoring_what_is_not_there_is_refused_and_changes_nothing(net):
    swaps = replace_modules(net, {"seq.0": Affine(), "alias": Affine()})
    net.seq[0] = nn.Identity()  # the user rebuilt a part
    before = fingerprint(net)
    with pytest.raises(ValueError, match=r"'seq\.0' are not in this model"):
        restore_modules(net, swaps)
    assert fingerprint(net) == before


def test_restoring_twice_is_refused(net):
    swaps = replace_modules(net, {"seq.0": Affine()})
    restore_modules(net, swaps)
    with pytest.raises(ValueError, match="done already"):
        restore_modules(net, swaps)
    reinstate_modules(net, swaps)
    with pytest.raises(ValueError, match="not in this model"):
        reinstate_modules(net, swaps)


def test_the_hook_dicts_named_are_all_that_torch_has():
    """A torch that keeps a new kind of hook must make this fail, not lose users' hooks."""
    from lightning_efficient.surgery import replace

    kept = {name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict) and "hook" in name}
    assert kept == set(replace._HOOKS)


def test_training_after_a_swap_reaches_the_new_parameters(net):
    new = Affine()
    replace_modules(net, {"alias": new})
    net(TOKENS).square().sum().backward()
    assert new.gain.grad is not None
    assert new.gain.grad.abs().item() > 0
