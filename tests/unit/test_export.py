"""export: a plain copy, checked; the original untouched; bad input refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from export_models import MODELS, Decoder, Lit, bert
from timm.utils import reparameterize_model
from torch import Tensor, nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.comparing import ExportError, difference
from lightning_efficient.deploy.export import export
from lightning_efficient.lifecycle.hooks import install
from lightning_efficient.lifecycle.state import Request, attachment
from lightning_efficient.norms.plain import Affine, affine_module

OURS = "lightning_efficient.toy"  # the package whose layers export fuses


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


class Snapshot:
    """Everything of a model that exporting could disturb."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.classes = [(m, type(m), m.training, set(vars(m))) for m in model.modules()]
        self.tensors = {n: (t, t.detach().clone(), t._version) for n, t in self._named()}
        self.rng = torch.get_rng_state()

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]

    def assert_unchanged(self) -> None:
        assert [(m, type(m), m.training, set(vars(m))) for m in self.model.modules()] == self.classes
        now = dict(self._named())
        assert now.keys() == self.tensors.keys()
        for name, (tensor, value, version) in self.tensors.items():
            assert now[name] is tensor, name
            assert tensor._version == version, name
            torch.testing.assert_close(tensor, value, rtol=0, atol=0)
            assert tensor.grad is None, name
        assert torch.equal(torch.get_rng_state(), self.rng)


@pytest.mark.parametrize("name", MODELS)
def test_export_is_an_exact_independent_plain_copy(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.train()
    next(iter(model.children())).eval()  # a user's frozen part keeps its own flag
    before = Snapshot(model)

    plain = export(model, inputs)

    before.assert_unchanged()
    assert type(plain) is type(model)
    assert not any(m.training for m in plain.modules())
    state, copied = model.state_dict(), plain.state_dict()
    assert state.keys() == copied.keys()
    assert all(torch.equal(state[k], copied[k]) for k in state)
    assert not {t.data_ptr() for t in state.values()} & {t.data_ptr() for t in copied.values()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == flags
    with torch.no_grad():
        assert difference(call(model.eval(), inputs), call(plain, inputs)).absolute == 0.0


def test_tying_and_shared_modules_survive() -> None:
    model = Decoder()
    model.again = model.qkv
    plain = export(model, torch.randint(12, (1, 3)))
    assert plain.head.weight is plain.embed.weight
    assert plain.again is plain.qkv


# -- what is taken out -----------------------------------------------------------------------------------------------


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("callbacks must not be copied")


def _attached(model: Lit) -> Lit:
    """The module as a Trainer with one of our structural callbacks leaves it."""
    install(model, Request("toy", "key", {}, MethodType(lambda cb, m: Change(method="toy"), Uncopyable())))
    return model


def test_attributes_and_methods_on_the_instance_are_taken_off() -> None:
    model = Lit()
    theirs = MethodType(lambda self: "theirs", model)  # as LightningCLI does
    model.configure_optimizers = theirs
    _attached(model)
    assert "_lightning_efficient" in vars(model)
    assert vars(model)["configure_optimizers"].__func__.__module__.startswith("lightning_efficient")

    plain = export(model, torch.randn(1, 4))

    assert "_lightning_efficient" in vars(model)
    assert model.configure_optimizers.__func__.__module__.startswith("lightning_efficient")
    assert "_lightning_efficient" not in vars(plain)
    assert not {"configure_model", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(plain))
    assert plain.configure_optimizers() == "theirs"
    assert plain.configure_optimizers.__self__ is plain


def test_hooks_of_the_package_go_and_hooks_of_the_user_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    seen: list[int] = []
    model[0].register_forward_hook(lambda m, a, out: out * 2)
    state_hook = model[1].register_state_dict_post_hook(lambda *args: seen.append(1))

    class Monitor(Uncopyable):
        __module__ = "lightning_efficient.callbacks.toy"

        def look(self, module: nn.Module, args: Any) -> None:
            self.looked = True

    monitor = Monitor()
    handle = model[1].register_forward_pre_hook(monitor.look)
    x = torch.randn(3, 4)
    plain = export(model, x)
    assert handle.id in model[1]._forward_pre_hooks
    assert not plain[1]._forward_pre_hooks
    assert torch.equal(plain(x), model[1](model[0](x)))
    assert not torch.equal(plain[0](x), F.linear(x, plain[0].weight, plain[0].bias))
    plain.state_dict()
    assert seen
    state_hook.remove()


def test_plain_function_hook_of_the_package_goes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    calls: list[int] = []

    def quiet(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(1)

    quiet.__module__ = "lightning_efficient.callbacks.toy"
    model[0].register_forward_hook(quiet)
    x = torch.ones(1, 2)
    plain = export(model, x)
    calls.clear()
    plain(x)
    assert not calls
    model(x)
    assert calls


def test_compile_wrappers_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model = Lit(torch.compile(net, backend="aot_eager"))
    x = torch.randn(2, 4)
    plain = export(model, x)
    assert type(plain.net) is nn.Sequential
    assert list(plain.state_dict()) == list(net.state_dict(prefix="net."))
    assert type(export(torch.compile(net, backend="aot_eager"), x)) is nn.Sequential
    assert isinstance(model.net, type(torch.compile(net)))


def test_parametrizations_of_the_user_survive() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    model.zero_grad()
    plain = export(model, x)
    assert nn.utils.parametrize.is_parametrized(plain[0], "weight")
    with torch.no_grad():
        plain[0].parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(plain(x), model(x))  # each its own weights


def test_old_weight_norm_that_refuses_deepcopy_is_copied() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*weight_norm.*")
        layer = nn.utils.weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    layer(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    plain = export(layer, x)
    with torch.no_grad():
        plain.weight_g.mul_(2)
        torch.testing.assert_close(plain(x) - plain.bias, 2 * (layer(x) - layer.bias))


# -- fuse() ----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Linear layer whose output has a gain per channel; folds into the weight."""

    __module__ = OURS

    def __init__(self, features: int, error: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.gain = nn.Parameter(torch.rand(features) + 0.5)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)

    def fuse(self) -> nn.Linear:
        with torch.no_grad():
            self.linear.weight.mul_(self.gain[:, None]).add_(self.error)
            self.linear.bias.mul_(self.gain)
        return self.linear


class Twice(nn.Module):
    """Fuses to something that holds another layer of ours."""

    __module__ = OURS

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = Scaled(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))

    def fuse(self) -> nn.Sequential:
        return nn.Sequential(self.inner, self.inner)


def ours_in(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__module__.startswith("lightning_efficient")]


@pytest.mark.parametrize("net", [lambda: Scaled(4), lambda: nn.Sequential(Twice(4), nn.ReLU(), Scaled(4))])
def test_our_layers_are_fused_at_every_depth(net: Any) -> None:
    torch.manual_seed(0)
    model = net().train()
    x = torch.randn(5, 4)
    before = Snapshot(model)
    plain = export(model, x)
    before.assert_unchanged()
    assert ours_in(model)
    assert not ours_in(plain)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-6)


def test_timm_reparameterize_and_export_agree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"a": Scaled(4)})["a"], nn.ReLU(), Scaled(4))
    x = torch.randn(3, 4)
    ours, timms = export(model, x), reparameterize_model(model)
    assert [type(m) for m in ours.modules()] == [type(m) for m in timms.modules()]
    assert ours.state_dict().keys() == timms.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), timms.parameters(), strict=True))
    assert torch.equal(ours(x), timms(x))
    assert not torch.equal(ours[1].weight, model[1].linear.weight)  # something was fused


def test_aliases_of_a_fused_layer_are_replaced_too() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Scaled(4)
            self.second = self.first
            self.plain_list = [self.first]

        def forward(self, x: Tensor) -> Tensor:
            return self.plain_list[0](self.second(self.first(x)))

    model = Aliased()
    plain = export(model, torch.randn(2, 4))
    assert type(plain.first) is nn.Linear
    assert plain.first is plain.second
    assert plain.plain_list[0] is plain.first
    assert type(model.plain_list[0]) is Scaled


def test_other_peoples_fuse_is_not_called() -> None:
    class Theirs(nn.Linear):
        def fuse(self) -> nn.Module:
            raise AssertionError("not ours to call")

    assert type(export(nn.Sequential(Theirs(2, 2)), torch.randn(1, 2))[0]) is Theirs


def test_a_wrong_fuse_is_caught_and_nothing_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(4, error=1e-2), nn.Dropout(0.5)).train()
    x = torch.randn(8, 4)
    before = Snapshot(model)
    with pytest.raises(ExportError, match=r"max abs difference 0\.\d+ \(0\.\d+ of the output scale\)"):
        export(model, x)
    before.assert_unchanged()
    # Every weight of a row is off by 1e-2, so the output is off by 1e-2 Σx: the bound is what decides.
    with torch.no_grad():
        error = float(1e-2 * x.sum(1).abs().max() / model.eval()(x).abs().max())
    assert type(export(model, x, tolerance=1.001 * error)[0]) is nn.Linear
    with pytest.raises(ExportError):
        export(model, x, tolerance=0.999 * error)


@pytest.mark.parametrize("result", [None, Scaled(4)])
def test_fuse_that_gives_no_plain_form(result: Any) -> None:
    class Broken(Scaled):
        __module__ = OURS

        def fuse(self) -> Any:
            return self if result is not None else None

    with pytest.raises(ExportError, match=r"Broken.fuse\(\) returned"):
        export(nn.Sequential(Broken(4)), torch.randn(1, 4))


def test_layers_without_a_plain_form_are_refused_by_name() -> None:
    class NoFuse(nn.Linear):
        __module__ = OURS

    class Parametrization(nn.Module):
        __module__ = OURS

        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    with pytest.raises(ExportError, match=r"no plain form.*'1': 'NoFuse'"):
        export(nn.Sequential(nn.ReLU(), NoFuse(2, 2)), torch.randn(1, 2))
    layer = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Parametrization())
    with pytest.raises(ExportError, match=r"'parametrizations\.weight\.0': 'Parametrization'"):
        export(layer, torch.randn(1, 2))


# -- verification ----------------------------------------------------------------------------------------------------


def test_difference_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        export(nn.Linear(2, 2), torch.randn(3, 2))
    assert "max abs difference 0 " in caplog.text
    assert "(3, 2)" in caplog.text


def test_random_and_stateful_forwards_leave_no_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(2))
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.seen + x.mean(0)
            return F.dropout(x * self.weight, 0.5, training=True) + self.calls

    model, x = Noisy(), torch.randn(64, 2)
    before = Snapshot(model)
    version = before.tensors["calls"][2]
    plain = export(model, x)  # equal outputs although each draws: both start from one random state
    assert model.calls == 0
    assert torch.equal(model.seen, torch.zeros(2))
    assert plain.calls == 0
    assert torch.equal(torch.get_rng_state(), before.rng)
    before.tensors["calls"] = (model.calls, torch.zeros(()), model.calls._version)
    assert model.calls._version > version  # it was written and put back
    before.assert_unchanged()


def test_inputs_written_in_place_by_the_model() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    x = torch.zeros(3)
    export(InPlace(), x)
    assert torch.equal(x, torch.zeros(3))


@pytest.mark.parametrize(
    ("before", "after", "absolute", "relative"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]), 0.5, 0.125),
        (torch.zeros(2), torch.tensor([0.0, 1e-3]), 1e-3, 1e-3),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), float("inf"), float("inf")),
        (torch.tensor([float("inf"), 2.0]), torch.tensor([float("inf"), 1.0]), 1.0, 0.5),
        (torch.tensor([float("inf"), 2.0]), torch.tensor([float("-inf"), 2.0]), float("inf"), float("inf")),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), float("inf"), float("inf")),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 5.0, 1.0),
        (torch.tensor([True]), torch.tensor([False]), 1.0, 1.0),
        (torch.tensor([2**53]), torch.tensor([2**53 - 2]), 2.0, 2.0**-52),
        (torch.empty(0, 3), torch.empty(0, 3), 0.0, 0.0),
    ],
)
def test_difference_on_hard_values(before: Tensor, after: Tensor, absolute: float, relative: float) -> None:
    found = difference({"y": before}, {"y": after})
    assert found.absolute == pytest.approx(absolute, rel=1e-6)
    assert found.relative == pytest.approx(relative, rel=1e-6)


def test_difference_of_nested_outputs_names_the_worst_relative_one() -> None:
    before = {"big": torch.tensor([1000.0]), "small": (torch.tensor([1e-3]), None)}
    after = {"big": torch.tensor([1001.0]), "small": (torch.tensor([2e-3]), None)}
    found = difference(before, after)
    assert found.output == "small.0"
    assert found.absolute == pytest.approx(1.0)
    assert found.relative == pytest.approx(1.0)
    with pytest.raises(ExportError, match=r"'small\.0'"):
        found.check(1e-5, "it")
    with pytest.raises(ExportError, match="structure"):
        difference(before, {"big": torch.zeros(1)})
    with pytest.raises(ExportError, match="no tensor"):
        difference("text", "text")


# -- example inputs --------------------------------------------------------------------------------------------------


def test_example_input_array_is_used() -> None:
    model = Lit()
    model.example_input_array = torch.randn(1, 4)
    assert type(export(model)) is Lit


@pytest.mark.parametrize(
    "batch",
    [torch.randn(2, 4), (torch.randn(2, 4), torch.zeros(2)), [torch.randn(2, 4), torch.zeros(2)]],
    ids=["tensor", "tuple", "list"],
)
def test_a_training_batch_is_used(batch: Any) -> None:
    model = _attached(Lit())
    attachment(model).example_batch = batch
    plain = export(model)
    assert "_lightning_efficient" not in vars(plain)
    assert attachment(model).example_batch is batch


def test_a_training_batch_of_keywords_is_used() -> None:
    net, inputs = bert()
    model = Lit(net)
    model.forward = MethodType(lambda self, input_ids, attention_mask: self.net(input_ids, attention_mask), model)
    attachment(model).example_batch = inputs
    assert export(model)(**inputs).last_hidden_state.shape == (2, 5, 16)


def test_a_training_batch_that_does_not_fit_is_an_error() -> None:
    model = Lit()
    attachment(model).example_batch = (torch.randn(2, 5), torch.zeros(2))
    with pytest.raises(ExportError, match=r"fails .*\[.*\(2, 5\).*; \[.*\(2, 5\).*`example_inputs`"):
        export(model)


def test_no_example_inputs_is_an_error_that_names_the_argument() -> None:
    for model in (Lit(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="example_inputs"):
            export(model)


def test_no_forward_names_the_submodules() -> None:
    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(2, 2)
            self.heads = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(ExportError, match=r"defines no `forward`.*export\(module.encoder, x\)\."):
        export(Bare(), torch.randn(1, 2))
    with pytest.raises(ExportError, match="defines no `forward`"):
        export(nn.ModuleList([nn.Linear(2, 2)]), torch.randn(1, 2))


@pytest.mark.parametrize("inputs", [torch.randn(1, 5), {"wrong": torch.randn(1, 4)}, ()])
def test_inputs_the_model_refuses(inputs: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)).train()
    before = Snapshot(model)
    with pytest.raises(ExportError, match=r"fails in evaluation mode on the example inputs"):
        export(model, inputs)
    before.assert_unchanged()


@pytest.mark.parametrize("inputs", [[torch.randn(1, 4)], 3, "x"])
def test_inputs_of_another_type(inputs: Any) -> None:
    with pytest.raises(TypeError, match="`example_inputs` takes a tensor"):
        export(nn.Linear(4, 2), inputs)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_tolerances_that_bound_nothing(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        export(nn.Linear(4, 2), torch.randn(1, 4), tolerance=tolerance)


def test_models_that_cannot_be_copied_name_the_attribute() -> None:
    model = Lit()
    model.net.lock = Uncopyable()
    with pytest.raises(ExportError, match=r"net\.lock"):
        export(model, torch.randn(1, 4))


def test_sharded_models_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, distribute_module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = distribute_module(nn.Linear(4, 4), DeviceMesh("cpu", [0]))
        with pytest.raises(ExportError, match="weight, bias: sharded over processes"):
            export(model, torch.randn(1, 4))
    finally:
        dist.destroy_process_group()
    wrapper = nn.Sequential(nn.Module())
    wrapper[0]._fsdp_wrapped_module = nn.Linear(4, 4)  # as FullyShardedDataParallel registers what it wraps
    with pytest.raises(ExportError, match="0: sharded over processes"):
        export(wrapper, torch.randn(1, 4))


def test_a_copy_that_needs_its_trainer_is_reported() -> None:
    class NeedsTrainer(Lit):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.trainer.max_epochs

    model = NeedsTrainer()
    model.trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ExportError, match="copy fails where the model does not"):
        export(model, torch.randn(1, 4))


def test_after_a_real_fit() -> None:
    model = Lit()
    model.training_step = MethodType(lambda self, batch, i: self(batch).square().mean(), model)
    loader = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(model, loader)
    plain = export(model, torch.randn(2, 4))
    assert model.trainer is trainer
    with pytest.raises(RuntimeError, match="not attached"):
        plain.trainer  # noqa: B018


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), nn.Linear(5, 3)
        self.part[0].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.part(x))
        return out


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")
def test_a_scripted_part_is_copied() -> None:
    model, x = Scripted(), torch.randn(2, 6)
    plain = export(model, x)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
    flags = {name: (p.requires_grad, p.is_leaf) for name, p in plain.named_parameters()}
    assert flags == {name: (name != "part.0.bias", True) for name, _ in model.named_parameters()}
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_an_exported_norm_has_a_dtype_to_ask_for_and_no_weight_in_files() -> None:
    """Hugging Face's Mamba reads ``norm.weight.dtype``; loaders would take a ``weight`` for a layer norm's."""
    norm = affine_module(Affine(torch.rand(3), torch.rand(3)), -1, torch.empty(0))
    x = torch.randn(2, 3)
    for one in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), torch.export.export(norm, (x,)).module()):
        torch.testing.assert_close(one(x), norm(x))
        assert set(one.state_dict()) == {"scale", "shift"}
    for one in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm).double()):
        assert one.weight.dtype == one.scale.dtype
