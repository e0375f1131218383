"""Optimizers after surgery: user code sees the plain model, and every parameter ends up where its weight was."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from lightning_efficient.common.change import Change
from lightning_efficient.surgery.optimizer import add_parameters, plain_view, rebind
from lightning_efficient.surgery.replace import replace_modules


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm1 = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)
        self.norm2 = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight  # tied, as in GPT

    def forward(self, tokens):
        return self.head(self.norm2(torch.relu(self.fc(self.norm1(self.embed(tokens))))))


class GainNorm(nn.Module):
    """A norm that is no LayerNorm for whoever groups by type: new weight, kept bias, and a gain."""

    def __init__(self, old, gain=True):
        super().__init__()
        self.scale = nn.Parameter(old.weight.detach().clone())
        self.bias = old.bias
        if gain:
            self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = nn.functional.layer_norm(x, x.shape[-1:], self.scale, self.bias)
        return y * self.gain if hasattr(self, "gain") else y


def swap(model, names=("norm1", "norm2"), gain=True):
    change = Change(method="norm_swap")
    change.swaps = replace_modules(model, {n: GainNorm(model.get_submodule(n), gain) for n in names})
    for name, (old, new) in change.swaps.items():
        change.targets[name] = "LayerNorm -> GainNorm"
        change.replaced.append((old.weight, new.scale))
        if gain:
            change.added.append((new.gain, new.scale))
    return change


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


TOKENS = torch.arange(6).reshape(2, 3)


def train(model, optimizer, steps, scheduler=None):
    losses = []
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            target = (TOKENS + step) % 6
            loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), target.flatten())
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        if scheduler is not None:
            scheduler.step()
    return losses


# --- ways in which users group ----------------------------------------------------------------------------------


def by_name(model):
    no_decay = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    decay = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "norm" in n)]
    return [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0, "lr": 2e-2}]


def by_ndim(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.05},
    ]


def by_module_type(model):
    """As in minGPT's configure_optimizers, assertions included."""
    decay, no_decay = set(), set()
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if name.endswith("bias"):
                no_decay.add(full)
            elif isinstance(module, nn.Linear):
                decay.add(full)
            elif isinstance(module, (nn.LayerNorm, nn.Embedding)):
                no_decay.add(full)
    parameters = dict(model.named_parameters())
    decay -= {"head.weight"}  # tied to the embedding, which named_parameters reports first
    assert not decay & no_decay
    assert not parameters.keys() - (decay | no_decay)
    return [
        {"params": [parameters[n] for n in sorted(decay)], "weight_decay": 0.1, "name": "decay"},
        {"params": [parameters[n] for n in sorted(no_decay)], "weight_decay": 0.0, "name": "no_decay"},
    ]


def by_attribute(model):
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    return [
        {"params": [model.embed.weight, model.fc.weight, model.fc.bias], "lr": 3e-2},
        {"params": [m.weight for m in norms], "lr": 1e-3},
        {"params": [m.bias for m in norms]},
    ]


def flat(model):
    return [{"params": list(model.parameters())}]


def with_names(model):
    return list(model.named_parameters())


GROUPINGS = [by_name, by_ndim, by_module_type, by_attribute, flat, with_names]

SCHEDULERS = {
    "none": lambda o: None,
    "step": lambda o: lrs.StepLR(o, 3),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 15),
    "lambda": lambda o: lrs.LambdaLR(o, [lambda s, i=i: 1 / (1 + s * (i + 1)) for i in range(len(o.param_groups))]),
    "one cycle": lambda o: lrs.OneCycleLR(o, [0.01 * (i + 1) for i in range(len(o.param_groups))], total_steps=50),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1), lrs.ExponentialLR(o, 0.9)], [5]),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, min_lr=[1e-4] * len(o.param_groups)),
}


def names_by_group(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def tail(test, cell):
    """Every grouping with every scheduler, in turn the one and the other way of making the optimizer."""
    if test != "test_matrix_of_groupings_and_schedulers":
        return False
    turn = GROUPINGS.index(cell["grouping"]) + list(SCHEDULERS).index(cell["schedule"])
    return cell["early"] is (turn % 2 == 0)


@pytest.mark.parametrize("early", [False, True], ids=["made in a plain view", "made before surgery"])
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_matrix_of_groupings_and_schedulers(net, grouping, schedule, early):
    untouched = copy.deepcopy(net)
    reference = torch.optim.AdamW(grouping(untouched), lr=1e-2)
    reference_scheduler = SCHEDULERS[schedule](reference)
    expected = names_by_group(reference, untouched)

    if early:  # as LightningCLI does
        optimizer = torch.optim.AdamW(grouping(net), lr=1e-2)
        change = swap(net)
    else:
        change = swap(net)
        with plain_view(net, [change]):
            optimizer = torch.optim.AdamW(grouping(net), lr=1e-2)
    scheduler = SCHEDULERS[schedule](optimizer)
    lists = [group["params"] for group in optimizer.param_groups]
    counts = rebind([optimizer], [change], [scheduler] if scheduler else [])
    assert (counts["replaced"], counts["added"], counts["removed"]) == (2, 2, 0)

    # Same groups, same positions, same list objects; only the replaced parameters differ.
    renamed = [[n.replace("norm1.weight", "norm1.scale") for n in group] for group in expected]
    renamed = [[n.replace("norm2.weight", "norm2.scale") for n in group] for group in renamed]
    assert names_by_group(optimizer, net)[: len(expected)] == renamed
    assert all(a["params"] is b for a, b in zip(optimizer.param_groups, lists, strict=False))

    # The gains: exactly once, no decay, everything else as in the group of their weight.
    home = next(g for g in optimizer.param_groups if any(p is net.norm1.scale for p in g["params"]))
    (new,) = optimizer.param_groups[len(expected) :]
    assert [id(p) for p in new["params"]] == [id(net.norm1.gain), id(net.norm2.gain)]
    assert new["weight_decay"] == 0.0
    same = new.keys() - {"params", "param_names", "weight_decay", "name"}
    assert {k: new[k] for k in same} == {k: home[k] for k in same}
    assert new.keys() == home.keys()
    everyone = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(everyone) == len(set(everyone))
    assert set(everyone) == set(net.parameters())

    for _ in range(20):
        for model, opt, sched in ((net, optimizer, scheduler), (untouched, reference, reference_scheduler)):
            train(model, opt, 1)
            if sched is not None:
                sched.step(*([1.0] if schedule == "plateau" else []))
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[: len(expected)] == [group["lr"] for group in reference.param_groups]
        assert new["lr"] == home["lr"]
    assert not torch.equal(net.norm1.gain, torch.ones(1))


# --- the plain view ---------------------------------------------------------------------------------------------


def test_inside_the_view_the_model_is_the_original_one(net):
    before = {name: id(p) for name, p in net.named_parameters()}
    modules = [(name, id(module)) for name, module in net.named_modules()]
    change = swap(net)
    changed = [(name, id(module)) for name, module in net.named_modules()]
    with plain_view(net, [change]):
        assert {name: id(p) for name, p in net.named_parameters()} == before
        assert [(name, id(module)) for name, module in net.named_modules()] == modules
    assert [(name, id(module)) for name, module in net.named_modules()] == changed


def test_the_view_survives_exceptions(net):
    change = swap(net)

    def configure_optimizers():
        assert isinstance(net.norm1, nn.LayerNorm)
        raise RuntimeError("user's own")

    with pytest.raises(RuntimeError, match="user's"), plain_view(net, [change]):
        configure_optimizers()
    assert isinstance(net.norm1, GainNorm)


def test_changes_on_top_of_each_other_are_undone_in_reverse(net):
    first = swap(net, names=["norm1"])
    second = Change(method="later")
    second.swaps = replace_modules(net, {"norm1": nn.Sequential(net.norm1)})
    third = Change(method="inside")
    inner = net.norm1[0]
    third.swaps = replace_modules(net, {"norm1.0": nn.Identity()})
    with plain_view(net, [first, second, third]):
        assert isinstance(net.norm1, nn.LayerNorm)
    assert isinstance(net.norm1[0], nn.Identity)
    assert inner not in set(net.modules())


def test_a_stale_change_is_refused_and_the_rest_put_back(net):
    stale, good = swap(net, names=["norm1"]), swap(net, names=["norm2"])
    net.norm1 = nn.LayerNorm(4)  # rebuilt by the user
    with pytest.raises(ValueError, match="'norm1'"), plain_view(net, [stale, good]):
        pass
    assert isinstance(net.norm2, GainNorm)


def test_a_view_without_changes(net):
    with plain_view(net, []), plain_view(net, [Change("masks")]):
        assert isinstance(net.norm1, nn.LayerNorm)


def test_what_user_code_freezes_inside_the_view_stays_frozen(net):
    change = swap(net)
    with plain_view(net, [change]):
        net.norm1.bias.requires_grad_(False)
    assert not net.norm1.bias.requires_grad


def test_a_lightning_module_with_its_own_configure_optimizers():
    lightning = pytest.importorskip("lightning.pytorch")

    class User(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.norms = [self.net.norm1, self.net.norm2]  # a plain list, as users keep them

        def configure_optimizers(self):
            weights = [norm.weight for norm in self.norms]
            rest = [p for n, p in self.named_parameters() if n not in ("net.norm1.weight", "net.norm2.weight")]
            return torch.optim.AdamW([{"params": weights, "lr": 1e-3}, {"params": rest}])

    module = User()
    change = swap(module, names=["net.norm1", "net.norm2"])
    assert module.norms == [module.net.norm1, module.net.norm2]
    assert all(isinstance(norm, GainNorm) for norm in module.norms)
    with plain_view(module, [change]):
        optimizer = module.configure_optimizers()
    rebind([optimizer], [change])
    scales, gains = params(optimizer)[0], params(optimizer)[2]
    assert scales == [id(norm.scale) for norm in module.norms]
    assert gains == [id(norm.gain) for norm in module.norms]


# --- state ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "AdamW, foreach amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=True, amsgrad=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, lr=1e-1, max_iter=2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(net, kind):
    """A swap that keeps function and parameters, in the middle of a run: bit for bit the untouched run."""
    untouched = copy.deepcopy(net)
    reference = OPTIMIZERS[kind](untouched.parameters())
    optimizer = OPTIMIZERS[kind](net.parameters())
    assert train(net, optimizer, 5) == train(untouched, reference, 5)
    counts = rebind([optimizer], [swap(net, gain=False)])
    assert counts["replaced"] == 2
    assert counts["state_moved"] == (0 if kind == "LBFGS" else 2)  # LBFGS keeps one state, under one parameter
    assert train(net, optimizer, 10) == train(untouched, reference, 10)
    for mine, theirs in zip(net.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert set(optimizer.state) <= set(net.parameters())
    saved = optimizer.state_dict()
    assert saved["state"].keys() <= {i for group in saved["param_groups"] for i in group["params"]}


def test_state_of_another_shape_is_dropped_with_one_warning(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, 2)
    change = Change("norm_swap")
    for name in ("norm1", "norm2"):
        new = nn.Module()
        new.scalar = nn.Parameter(torch.ones(1))
        new.forward = lambda x, new=new: x * new.scalar
        old = net.get_submodule(name)
        change.swaps |= replace_modules(net, {name: new})
        change.replaced.append((old.weight, new.scalar))
        change.removed.append(old.bias)
    with pytest.warns(UserWarning, match="state of 2 replaced parameters was dropped") as caught:
        counts = rebind([optimizer], [change])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert counts == {"replaced": 2, "removed": 2, "added": 0, "state_moved": 0, "state_dropped": 2}
    train(net, optimizer, 2)
    assert optimizer.state[net.norm1.scalar]["step"] == 2
    assert optimizer.state[net.fc.weight]["step"] == 4


def test_removed_parameters_leave_groups_names_and_state(net):
    optimizer = torch.optim.AdamW(list(net.named_parameters()), lr=1e-2)
    train(net, optimizer, 1)
    old = net.norm1
    change = Change("norm_swap", swaps=replace_modules(net, {"norm1": nn.Identity()}))
    change.removed = list(old.parameters())
    counts = rebind([optimizer], [change])
    assert counts["removed"] == 2
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["embed.weight", "fc.weight", "fc.bias", "norm2.weight", "norm2.bias"]
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert set(optimizer.state) == set(net.parameters())
    train(net, optimizer, 1)


def test_a_group_that_loses_all_its_parameters_stays(net):
    """Dropping it would shift the entries of every scheduler."""
    groups = [{"params": [net.norm1.weight, net.norm1.bias]}, {"params": list(net.fc.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = lrs.LambdaLR(optimizer, [lambda s: 1.0, lambda s: 0.5**s])
    removed = list(net.norm1.parameters())
    change = Change("x", swaps=replace_modules(net, {"norm1": nn.Identity()}), removed=removed)
    rebind([optimizer], [change], [scheduler])
    train(net, optimizer, 1, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


# --- several changes, several times -----------------------------------------------------------------------------


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def params(optimizer):
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def test_chains_of_changes_count_as_one():
    a, b, c, d = (parameter(2) for _ in range(4))
    gain, gain2, gain3, other = (parameter(1) for _ in range(4))
    changes = [
        Change("first", replaced=[(a, b)], added=[(gain, b), (other, d)]),
        Change("second", replaced=[(b, c), (gain, gain2)], removed=[other]),
        Change("third", added=[(gain3, b)]),  # b has become c already
    ]
    optimizer = torch.optim.SGD([a, d], lr=0.1)
    counts = rebind([optimizer], changes)
    assert params(optimizer) == [[id(c), id(d)], [id(gain2), id(gain3)]]
    assert (counts["replaced"], counts["added"], counts["removed"]) == (1, 2, 0)


def test_replaced_then_removed():
    a, b, keep = parameter(2), parameter(2), parameter(2)
    optimizer = torch.optim.SGD([a, keep], lr=0.1)
    rebind([optimizer], [Change("first", replaced=[(a, b)]), Change("second", removed=[b])])
    assert params(optimizer) == [[id(keep)]]


def test_a_change_and_its_undoing():
    a, b = parameter(2), parameter(2)
    optimizer = torch.optim.SGD([a], lr=0.1)
    rebind([optimizer], [Change("do", replaced=[(a, b)]), Change("undo", replaced=[(b, a)])])
    assert params(optimizer) == [[id(a)]]


def test_removed_then_taken_back():
    a, w = parameter(2), parameter(2)
    optimizer = torch.optim.SGD([a, w], lr=0.1)
    rebind([optimizer], [Change("do", removed=[a]), Change("undo", added=[(a, w)])])
    assert params(optimizer) == [[id(a), id(w)]]


def test_a_parameter_tied_to_one_that_is_there_leaves_it_where_it_is():
    a, b = parameter(2), parameter(2)
    optimizer = torch.optim.Adam([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 2.0}])
    a.grad, b.grad = torch.ones(2), torch.full((2,), 3.0)
    optimizer.step()
    state = optimizer.state[b]
    rebind([optimizer], [Change("tie", replaced=[(a, b)])])
    assert params(optimizer) == [[], [id(b)]]
    assert list(optimizer.state.values()) == [state]


def test_two_parameters_that_become_one_are_there_once():
    a, b, one = parameter(2), parameter(2), parameter(2)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    rebind([optimizer], [Change("tie", replaced=[(a, one), (b, one)])])
    assert params(optimizer) == [[id(one)], []]


@pytest.mark.parametrize("steps", [0, 3])
def test_doing_it_twice_changes_nothing_more(net, steps):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = lrs.StepLR(optimizer, 2)
    changes = [swap(net, names=["norm1"]), swap(net, names=["norm2"])]
    rebind([optimizer], changes, [scheduler])
    train(net, optimizer, steps, scheduler)
    before = (params(optimizer), {id(p): id(s) for p, s in optimizer.state.items()}, scheduler.state_dict())
    counts = rebind([optimizer], changes, [scheduler])
    assert set(counts.values()) == {0}
    after = (params(optimizer), {id(p): id(s) for p, s in optimizer.state.items()}, scheduler.state_dict())
    assert before == after


def test_no_changes(net):
    optimizer = torch.optim.AdamW(net.parameters())
    before = params(optimizer)
    assert set(rebind([optimizer], []).values()) == {0}
    assert set(rebind([], [Change("masks")]).values()) == {0}
    assert params(optimizer) == before


# --- several optimizers -----------------------------------------------------------------------------------------


def test_several_optimizers_each_get_their_own(net):
    first = torch.optim.AdamW([net.embed.weight, *net.norm1.parameters()], lr=1e-2, weight_decay=0.1)
    second = torch.optim.SGD([*net.fc.parameters(), *net.norm2.parameters()], lr=1e-3, momentum=0.9)
    schedulers = [lrs.StepLR(second, 2), lrs.ExponentialLR(first, 0.5)]
    biases = [id(net.norm1.bias), id(net.norm2.bias)]
    change = swap(net)
    counts = rebind([first, second], [change], schedulers)
    assert (counts["replaced"], counts["added"]) == (2, 2)
    assert params(first) == [[id(net.embed.weight), id(net.norm1.scale), biases[0]], [id(net.norm1.gain)]]
    assert params(second)[1] == [id(net.norm2.gain)]
    assert "momentum" in second.param_groups[1]
    assert [len(scheduler.base_lrs) for scheduler in schedulers] == [2, 2]
    for _ in range(5):
        for optimizer, scheduler in ((first, schedulers[1]), (second, schedulers[0])):
            train(net, optimizer, 1, scheduler)
            old, new = (group["lr"] for group in optimizer.param_groups)
            assert old == new


# --- adding -----------------------------------------------------------------------------------------------------


def test_one_group_per_source_group_and_unique_names():
    weights = [parameter(2, 2) for _ in range(4)]
    groups = [
        {"params": weights[:2], "name": "body", "lr": 0.1, "weight_decay": 0.5, "tags": ["x"]},
        {"params": weights[2:], "name": "head", "lr": 0.2},
        {"params": [parameter(1)], "name": "body_no_decay"},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    gains = [parameter(1) for _ in range(5)]
    add_parameters(optimizer, list(zip(gains, [*weights, weights[0]], strict=True)))
    body, head = optimizer.param_groups[3:]
    assert [id(p) for p in body["params"]] == [id(gains[0]), id(gains[1]), id(gains[4])]
    assert [id(p) for p in head["params"]] == [id(gains[2]), id(gains[3])]
    assert (body["name"], head["name"]) == ("body_no_decay_2", "head_no_decay")
    assert (body["lr"], body["betas"], body["weight_decay"], head["lr"]) == (0.1, (0.8, 0.9), 0.0, 0.2)
    assert body["tags"] == ["x"]
    assert body["tags"] is not optimizer.param_groups[0]["tags"]


def test_named_optimizers_get_unique_names():
    weight, gains = parameter(2), [parameter(1), parameter(1)]
    optimizer = torch.optim.SGD([("w", weight)], lr=0.1)
    add_parameters(optimizer, [(gain, weight) for gain in gains])
    assert optimizer.param_groups[1]["param_names"] == ["w.added", "w.added_2"]
    copied = torch.optim.SGD([("w", weight)], lr=0.1)
    copied.add_param_group({"params": list(zip(["w.added", "w.added_2"], gains, strict=True))})
    copied.load_state_dict(optimizer.state_dict())


def test_optimizers_without_weight_decay_get_none():
    weight, gain = parameter(2), parameter(1)
    optimizer = torch.optim.Rprop([weight], lr=0.1)
    add_parameters(optimizer, [(gain, weight)])
    assert "weight_decay" not in optimizer.param_groups[1]


def test_added_parameters_are_trained_without_decay():
    """A gain without gradient stays exactly 1 next to a weight that decays."""
    weight, gain = parameter(2), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    add_parameters(optimizer, [(gain, weight)])
    before = weight.detach().clone()
    for p in (weight, gain):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert gain.item() == 1.0
    torch.testing.assert_close(weight, before * (1 - 0.1 * 0.5))


def test_an_added_parameter_without_weight_follows_the_only_optimizer():
    weight, gain = parameter(2), parameter(1)
    optimizer = torch.optim.SGD([{"params": []}, {"params": [weight], "lr": 0.3}], lr=0.1)
    rebind([optimizer], [Change("masks", added=[(gain, None)])])
    assert params(optimizer)[2] == [id(gain)]
    assert optimizer.param_groups[2]["lr"] == 0.3


def test_frozen_parameters_may_stay_outside(net):
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=0.1)
    for p in [*net.norm1.parameters(), *net.norm2.parameters()]:
        p.requires_grad_(False)
    change = swap(net)
    for norm in (net.norm1, net.norm2):
        norm.scale.requires_grad_(False)
        norm.gain.requires_grad_(False)
    counts = rebind([optimizer], [change])
    assert set(counts.values()) == {0}


def test_a_frozen_addition_joins_its_weight_so_that_unfreezing_works():
    weight, gain = parameter(2), nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rebind([optimizer], [Change("masks", added=[(gain, weight)])])
    assert params(optimizer) == [[id(weight)], [id(gain)]]


def test_what_follows_a_frozen_weight_is_frozen_with_it(net):
    """Lightning's BackboneFinetuning freezes all but batch norms, and the new norm may be one."""
    optimizer, change = torch.optim.SGD(net.fc.parameters(), lr=0.1), swap(net)
    gains = [new for new, _ in change.added]
    for p in net.parameters():
        p.requires_grad = any(p is gain for gain in gains)
    rebind([optimizer], [change], model=net)
    assert gains
    assert not any(gain.requires_grad for gain in gains)
    assert params(optimizer) == [[id(p) for p in net.fc.parameters()]]


# --- errors: nothing changes ------------------------------------------------------------------------------------


def fingerprint(optimizers, schedulers=()):
    return (
        [params(o) for o in optimizers],
        [{id(p): (id(s), sorted(s)) for p, s in o.state.items()} for o in optimizers],
        [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers],
        [copy.copy(vars(s)) for s in schedulers],
    )


def untrained(net):
    return [torch.optim.AdamW(net.fc.parameters())], [swap(net)]


def in_two(net):
    optimizers = [torch.optim.AdamW(net.parameters()), torch.optim.SGD(net.norm1.parameters(), lr=0.1)]
    return optimizers, [swap(net)]


def added_in_two(net):
    optimizers = [torch.optim.AdamW(net.parameters()), torch.optim.SGD(net.fc.parameters(), lr=0.1)]
    return optimizers, [swap(net, gain=False), Change("sigma_reparam", added=[(parameter(1), net.fc.weight)])]


def added_nowhere(net):
    return [torch.optim.AdamW(net.fc.parameters())], [Change("sigma_reparam", added=[(parameter(1), net.embed.weight)])]


def no_source_two_optimizers(net):
    optimizers = [torch.optim.AdamW(net.fc.parameters()), torch.optim.SGD(net.norm1.parameters(), lr=0.1)]
    return optimizers, [Change("masks", added=[(parameter(1), None)])]


def lbfgs(net):
    return [torch.optim.LBFGS(net.parameters())], [swap(net)]


def muon(net):
    optimizers = [torch.optim.AdamW([p for p in net.parameters() if p is not net.fc.weight])]
    optimizers.append(torch.optim.Muon([net.fc.weight]))
    gains = [(parameter(1), net.embed.weight), (parameter(1), net.fc.weight)]
    return optimizers, [swap(net, gain=False), Change("sigma_reparam", added=gains)]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (untrained, r"norm1\.gain \(it follows norm1\.scale\) is trainable but its weight is in no optimizer"),
        (in_two, r"norm1\.gain \(it follows norm1\.scale\) would be in 2 optimizers"),
        (added_in_two, r"added by sigma_reparam \(it follows fc\.weight\) would be in 2 optimizers"),
        (added_nowhere, r"added by sigma_reparam \(it follows embed\.weight\) is trainable but .* in no optimizer"),
        (no_source_two_optimizers, r"added by masks \(it follows no particular weight\)"),
        (lbfgs, "LBFGS allows one parameter group only"),
        (muon, r"Muon optimizes matrices only, so the added parameter of shape \(1,\)"),
    ],
)
def test_errors_name_the_parameter_and_change_nothing(net, case, text):
    optimizers, changes = case(net)
    schedulers = [lrs.StepLR(optimizer, 2) for optimizer in optimizers]
    before = fingerprint(optimizers, schedulers)
    with pytest.raises(ValueError, match=text):
        rebind(optimizers, changes, schedulers, model=net)
    assert fingerprint(optimizers, schedulers) == before


def test_a_replaced_parameter_in_no_optimizer_is_named(net):
    optimizer = torch.optim.AdamW(net.fc.parameters())
    with pytest.raises(ValueError, match=r"norm1\.scale is trainable .*requires_grad=False.*`exclude`"):
        rebind([optimizer], [swap(net, gain=False)])


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (lambda w, g: [(g, parameter(3, 3))], r"weight of shape \(3, 3\) .* is not in this SGD"),
        (lambda w, g: [(w, w)], "in the optimizer already"),
        (lambda w, g: [(g, w), (g, w)], "in the optimizer already"),
    ],
)
def test_add_parameters_checks_first(pairs, text):
    weight, gain = parameter(2), parameter(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = lrs.StepLR(optimizer, 2)
    before = fingerprint([optimizer], [scheduler])
    with pytest.raises(ValueError, match=text):
        add_parameters(optimizer, pairs(weight, gain), [scheduler])
    assert fingerprint([optimizer], [scheduler]) == before


def test_what_torch_refuses_is_undone_too():
    weight, gain = parameter(2), parameter(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    not_a_leaf = gain * 2
    with pytest.raises(ValueError, match="non-leaf"):
        add_parameters(optimizer, [(not_a_leaf, weight)])
    assert params(optimizer) == [[id(weight)]]
