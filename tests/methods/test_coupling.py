"""Which channels hang together, on networks where the answer can be said by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress_search.exceptions import ModelError
from compress_search.fingerprint import model_fingerprint
from compress_search.methods.coupling import find_coupling, keep_blocks

EXAMPLE = torch.zeros(1, 3, 8, 8)


def _members(group) -> set[tuple[str, str]]:
    return {(member.layer, member.side) for member in group.members}


def test_a_chain_is_one_group_a_layer_and_the_head_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 2))
    coupling = find_coupling(model, EXAMPLE)
    assert [group.name for group in coupling.groups] == ["0", "2"]
    first, second = coupling.groups
    assert _members(first) == {("0", "outputs"), ("2", "inputs")}
    assert first.members[0].blocks == ((0,), (1,), (2,), (3,))
    # Flattening gives each channel of the convolution 16 features of the linear layer.
    assert second.consumers[0].blocks[1] == tuple(range(16, 32))
    assert coupling.reasons == {"4": "it makes the network's output"}


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.one(x) + self.other(x)))).mean(dim=(2, 3))


def test_what_is_added_is_removed_together():
    (group,) = find_coupling(Add(), EXAMPLE).groups
    assert _members(group) == {
        ("one", "outputs"),
        ("other", "outputs"),
        ("norm", "outputs"),
        ("head", "inputs"),
    }
    assert group.name == "one"


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), self.other(x)], dim=1))


def test_concatenated_channels_are_separate_groups_at_an_offset():
    model = Cat()
    one, other = find_coupling(model, EXAMPLE).groups
    assert one.consumers[0].blocks == ((0,), (1,))
    assert other.consumers[0].blocks == ((2,), (3,), (4,))
    edits = {edit.layer: edit for edit in keep_blocks(model, [one, other], {"one": [1], "other": [0, 2]})}
    assert edits["head"].inputs == (1, 2, 4)
    assert edits["one"].outputs == (1,) and edits["other"].outputs == (0, 2)


class TwoOutputs(nn.Module):
    """The hidden map is an output as well, so its channels must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        hidden = self.hidden(self.stem(x))
        return self.head(hidden), hidden


def test_channels_that_leave_the_network_stay():
    coupling = find_coupling(TwoOutputs(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["stem"]
    assert coupling.reasons["hidden"] == "it makes the network's output"


class FixedWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.hidden(self.stem(x))
        return self.head((hidden * torch.ones(1, 4, 1, 1)).mean(dim=(2, 3)))


def test_a_network_that_counts_on_a_width_keeps_it_with_the_error_as_reason():
    coupling = find_coupling(FixedWidth(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["stem"]
    assert "the network fails (RuntimeError" in coupling.reasons["hidden"]


class Swapped(nn.Module):
    """The halves of a map change places on the way, which the dependency graph does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.hidden(torch.flip(self.norm(self.stem(x)), dims=[1])))


def test_channels_that_are_tied_in_a_hidden_way_are_found_out_and_stay():
    coupling = find_coupling(Swapped(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["hidden"]
    reason = "its channels are tied in a way that torch-pruning's graph does not show"
    assert coupling.reasons == {"stem": reason, "head": "it makes the network's output"}


class SharedWeight(nn.Module):
    """Two layers that share a weight: cutting the inputs of one leaves the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.two.weight = self.one.weight
        self.rest = Swapped()
        self.rest.stem = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.rest(torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x)))))))


def test_a_group_is_tried_without_changing_what_shares_its_consumers_weight():
    # The last one fails, so that each is tried alone.
    coupling = find_coupling(SharedWeight(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["stem", "one", "two", "rest.hidden"]


class CountedFromTheEnd(nn.Module):
    """The last channels of a map are something else; without one of the others they still are the last."""

    def __init__(self, take) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
        self.take = take

    def forward(self, x):
        return self.head(self.hidden(self.take(self.stem(x))))


def _last_ones_shifted(x):
    return torch.cat([x[:, :-3], torch.roll(x[:, -3:], 1, dims=2)], dim=1)


def _last_ones_negated(x):
    is_last = torch.arange(x.shape[1]) >= x.shape[1] - 3
    return torch.where(is_last[:, None, None], -x, x)


@pytest.mark.parametrize("take", [_last_ones_shifted, _last_ones_negated])
def test_channels_that_are_counted_from_the_end_are_found_out_and_stay(take):
    coupling = find_coupling(CountedFromTheEnd(take), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["hidden"]
    assert "stem" in coupling.reasons


def test_a_rectifier_of_one_slope_has_whatever_channels_it_is_given():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(), nn.Conv2d(8, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    coupling = find_coupling(net, EXAMPLE)
    assert [group.name for group in coupling.groups] == ["0", "2"]


class LastOnesApart(nn.Module):
    """A layer for the last channels of a map, and one for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 4, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.one(x[:, :-3]) + self.other(x[:, -3:]))


def test_channels_that_the_graph_numbers_wrongly_stay():
    coupling = find_coupling(LastOnesApart(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["one"]
    assert "wrongly" in coupling.reasons["stem"]


def test_a_group_norm_elsewhere_does_not_hide_such_ties():
    normalised = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 3, 1), Swapped())
    coupling = find_coupling(normalised, EXAMPLE)
    assert [group.name for group in coupling.groups] == ["0", "2", "3.hidden"]
    assert (
        coupling.reasons["3.stem"]
        == "its channels are tied in a way that torch-pruning's graph does not show"
    )


HIDDEN = "its channels are tied in a way that torch-pruning's graph does not show"


def _shuffled(x):
    halves = x.unflatten(1, (2, -1))
    return halves.transpose(1, 2).flatten(1, 2)


class Mixed(nn.Module):
    """Channels change places between a normalisation and the layer that listens."""

    def __init__(self, norm: nn.Module, mix) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 16, 1), norm, nn.Conv2d(16, 2, 1)
        self.mix = mix

    def forward(self, x):
        return self.head(self.mix(self.norm(self.stem(x))))


class ChannelsFirstNorm(nn.LayerNorm):
    """Over the channels of a map, as in ConvNeXt."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


NORMS = [
    lambda: nn.GroupNorm(2, 16),
    lambda: nn.GroupNorm(2, 16, affine=False),
    lambda: ChannelsFirstNorm(16),
]


@pytest.mark.parametrize(
    ("norm", "mix"),
    [(norm, lambda x: x.flip(1)) for norm in NORMS] + [(norm, _shuffled) for norm in NORMS[:2]],
)
def test_normalisation_across_channels_does_not_hide_such_ties(norm, mix):
    torch.manual_seed(0)
    coupling = find_coupling(Mixed(norm(), mix), EXAMPLE)
    assert not coupling.groups
    assert coupling.reasons["stem"] == HIDDEN


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_channels_under_a_normalisation_across_them_are_found(norm, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), norm(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    coupling = find_coupling(model.to(dtype), EXAMPLE.to(dtype))
    assert [group.name for group in coupling.groups] == ["0", "2"]


class Tokens(nn.Module):
    """A transformer layer, for which PyTorch has a way past the modules of which it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def test_the_hidden_channels_of_a_transformer_layer_are_found_and_its_short_way_is_left_open():
    torch.manual_seed(0)
    model = Tokens()
    assert [group.name for group in find_coupling(model, EXAMPLE).groups] == ["layer.linear1"]
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any("forward" in vars(module) for module in model.modules())


FRONTS = [torch.sqrt, lambda x: torch.log(x + 1e-3), lambda x: x**0.4545]


class Front(nn.Module):
    """Takes no negative inputs."""

    def __init__(self, function, behind: nn.Module) -> None:
        super().__init__()
        self.function, self.behind = function, behind

    def forward(self, x):
        return self.behind(self.function(x))


@pytest.mark.parametrize("function", FRONTS)
@pytest.mark.parametrize("example", [EXAMPLE, torch.full((1, 3, 8, 8), 0.5), torch.rand(1, 3, 8, 8)])
def test_ties_are_found_and_found_out_behind_what_takes_no_negative_inputs(function, example):
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert [group.name for group in find_coupling(Front(function, chain), example).groups] == ["behind.0"]
    coupling = find_coupling(Front(function, Swapped()), example)
    assert [group.name for group in coupling.groups] == ["behind.hidden"]
    assert coupling.reasons["behind.stem"] == HIDDEN


def test_a_network_of_few_inputs_is_tried_on_the_example():
    def bounded(x):
        assert x.min() >= 100.0
        return torch.sqrt(100.0 - x + 5.0)

    torch.manual_seed(0)
    coupling = find_coupling(Front(bounded, Swapped()), 100.0 + 4.0 * torch.rand(1, 3, 8, 8))
    assert [group.name for group in coupling.groups] == ["behind.hidden"]
    assert coupling.reasons["behind.stem"] == HIDDEN


def test_without_numbers_no_group_can_be_tried():
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    coupling = find_coupling(Front(lambda x: x / 0.0 - x / 0.0, chain), EXAMPLE)
    assert not coupling.groups
    assert "the network's outputs hold NaN" in coupling.reasons["behind.0"]


class WithInfinity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Swapped()

    def forward(self, x):
        x = self.body(x)
        return torch.cat([x, torch.full_like(x[:, :1], -torch.inf)], dim=1)


def test_infinite_outputs_do_not_hide_such_ties():
    torch.manual_seed(0)
    coupling = find_coupling(WithInfinity(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["body.hidden"]
    assert coupling.reasons["body.stem"] == HIDDEN


def test_an_ignored_layer_keeps_its_whole_group():
    coupling = find_coupling(Add(), EXAMPLE, ignore=["other"])
    assert not coupling.groups
    assert coupling.reasons["one"] == coupling.reasons["other"] == "you asked to leave other alone"


def test_a_model_that_cannot_be_traced_says_why():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            raise RuntimeError("no forward today")

    with pytest.raises(ModelError, match=r"no forward today.*channel_pruning"):
        find_coupling(Detached(), EXAMPLE)


@pytest.mark.parametrize(
    ("cut", "operation"),
    [
        (lambda y: y.detach(), "detach"),
        (lambda y: y.data, "data"),
        (lambda y: torch.tensor(y.tolist()), "tolist"),
    ],
)
def test_layers_that_the_trace_does_not_reach_say_where_it_is_lost(cut, operation):
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.c(torch.relu(cut(self.b(torch.relu(self.a(x)))))).mean((2, 3)))

    coupling = find_coupling(Cut().eval(), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["c"]
    reason = f"the trace of the model is lost at {operation} between it and the output"
    assert {name: coupling.reasons[name] for name in ("a", "b")} == {"a": reason, "b": reason}


def test_the_model_is_not_changed():
    model = Add().train()
    model.one.weight.requires_grad_(False)
    find_coupling(model, EXAMPLE)
    assert model.training and not model.one.weight.requires_grad and model.one.weight.grad is None


class Auxiliary(nn.Module):
    """Both heads listen to the body; the second one runs in training alone."""

    def __init__(self, *, fixed_width: bool = False) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.aux, self.norm, self.aux_head = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)
        self.head, self.fixed_width = nn.Conv2d(6, 2, 1), fixed_width

    def forward(self, x):
        shallow = self.stem(x)
        main = self.head(self.body(shallow))
        if not self.training:
            return main
        if self.fixed_width:
            shallow = shallow * torch.ones(1, 4, 1, 1)
        return {"main": main, "auxiliary": self.aux_head(torch.relu(self.norm(self.aux(shallow))))}


def test_a_head_that_runs_in_training_alone_is_cut_along():
    model = Auxiliary()
    stem, body = find_coupling(model, EXAMPLE).groups
    assert _members(stem) == {("stem", "outputs"), ("body", "inputs"), ("aux", "inputs")}
    assert [(member.layer, member.idle) for member in stem.members] == [
        ("stem", False),
        ("body", False),
        ("aux", True),
    ]
    # It has no say in which channels stay, for nothing is known of its inputs.
    assert [member.layer for member in stem.consumers] == ["body"]
    assert _members(body) == {("body", "outputs"), ("head", "inputs")}


def test_what_training_alone_makes_has_no_group_and_no_reason():
    assert find_coupling(Auxiliary(), EXAMPLE).reasons == {"head": "it makes the network's output"}


def test_a_head_of_training_that_counts_on_a_width_keeps_it():
    coupling = find_coupling(Auxiliary(fixed_width=True), EXAMPLE)
    assert [group.name for group in coupling.groups] == ["body"]
    assert "the network fails in training (RuntimeError" in coupling.reasons["stem"]


def test_the_paths_of_training_leave_statistics_modes_and_random_numbers_alone():
    model = Auxiliary().train()
    model.body.eval()
    before, random = model_fingerprint(model), torch.get_rng_state()
    find_coupling(model, EXAMPLE)
    assert model_fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and model.norm.training and not model.body.training


class WithTargets(nn.Module):
    """In training, detectors want targets: what they run there cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x, targets=None):
        if self.training:
            assert targets is not None
        return self.head(self.stem(x))


def test_a_model_that_wants_more_than_inputs_in_training_is_traced_in_evaluation():
    assert [group.name for group in find_coupling(WithTargets(), EXAMPLE).groups] == ["stem"]
