"""What every selector keeps to, whatever method it sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from compress_search.exceptions import ConfigError, RatioError
from compress_search.methods import METHODS
from compress_search.methods.cost import COST_KINDS
from compress_search.profile import profile_model
from compress_search.selection import SELECTORS
from compress_search.selection.choices import size_choices
from compress_search.selection.request import SelectionRequest

WIDTHS = [32, 40, 48, 56, 64, 72]
"""Enough different sizes that any ratio is nearly met."""

every_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
every_method = pytest.mark.parametrize("method", METHODS)
# The fixtures make things of their arguments, and keep nothing.
drawn = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_selector
@drawn
@given(
    method=st.sampled_from(list(METHODS)),
    widths=st.lists(st.integers(4, 40), min_size=2, max_size=5),
    request_=st.builds(
        SelectionRequest,
        ratio=st.floats(0.05, 1.0),
        cost=st.sampled_from(COST_KINDS),
        round_to=st.sampled_from([1, 2, 4, 8]),
        least_share=st.sampled_from([0.0, 0.0, 0.2]),
    ),
    seed=st.integers(0, 1000),
)
def test_sizes_keep_to_what_is_asked(analysed, make_table, selector, method, widths, request_, seed):
    analysis = analysed(method, widths)
    table = make_table(analysis, seed=seed) if selector.needs_table else None
    cost, choices = analysis.cost(request_.cost), size_choices(analysis, request_)
    least = cost.of({name: allowed[0] for name, allowed in choices.items()})
    if least > request_.ratio * cost.of({}):
        with pytest.raises(RatioError, match="smallest reachable is"):
            selector.select(analysis, request_, table)
        return
    try:
        sizes = selector.select(analysis, request_, table)
    except RatioError as error:
        assume("below the candidates" not in str(error))
        raise
    assert cost.of(sizes) <= request_.ratio * cost.of({})
    for name, size in sizes.items():
        assert size in choices[name]
        assert size % choices[name].step == 0
        share = (
            size / cost.full[name] if name not in cost.dense else (size * cost.rates[name] / cost.dense[name])
        )
        assert share >= request_.least_share


@every_selector
@every_method
@pytest.mark.parametrize("kind", COST_KINDS)
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.66, 0.75, 0.9])
def test_the_ratio_is_met_within_half_a_per_cent(analysed, make_table, selector, method, kind, ratio):
    analysis = analysed(method, WIDTHS)
    request = SelectionRequest(ratio=ratio, cost=kind)
    sizes = selector.select(analysis, request, make_table(analysis))
    cost = analysis.cost(kind)
    assert 0.995 * ratio <= cost.of(sizes) / cost.of({}) <= ratio
    counted = profile_model(analysis.apply(sizes, []).model, torch.zeros(1, 3, 8, 8))
    assert getattr(counted, kind) == cost.of(sizes)


@every_selector
@every_method
def test_a_ratio_of_one_changes_nothing(analysed, make_table, selector, method):
    analysis = analysed(method, [16, 16, 16])
    assert selector.select(analysis, SelectionRequest(ratio=1.0), make_table(analysis)) == {}


@every_selector
def test_what_holds_a_ratio_up_is_named(analysed, make_table, selector):
    analysis = analysed("spatial_svd", [32, 32, 32], ignore=["layers.2"])
    request = SelectionRequest(ratio=0.2, round_to=8)
    smallest = {name: allowed[0] for name, allowed in size_choices(analysis, request).items()}
    least = analysis.predict_macs(smallest) / analysis.profile.macs
    with pytest.raises(RatioError) as caught:
        selector.select(analysis, request, make_table(analysis))
    message = str(caught.value)
    assert f"smallest reachable is {least:.2f}" in message
    assert "go without round_to=8 (the smallest is 0." in message
    assert "lift what holds it up: layers.2 (47." in message and "you asked to leave it alone)" in message


def test_a_least_share_is_named_too_and_parameters_that_no_layer_has(analysed):
    analysis = analysed("channel_pruning", [32, 32, 32])
    request = SelectionRequest(ratio=0.05, cost="params", least_share=0.5)
    with pytest.raises(RatioError, match=r"of the parameters cannot.*go without least_share=0\.5 \("):
        SELECTORS["uniform"].select(analysis, request, None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0.0}, RatioError, r"in \(0, 1\], not 0"),
        ({"ratio": 1.2}, RatioError, r"not 1\.2"),
        ({"ratio": 0.5, "least_share": 1.0}, RatioError, r"least_share must be in \[0, 1\), not 1"),
        ({"ratio": 0.5, "shares": {"a": 0.0, "b": 2}}, RatioError, r"'a': 0.0, 'b': 2"),
        ({"ratio": 0.5, "cost": "flops"}, ConfigError, "cost is 'flops'; it must be one of macs, params"),
        ({"ratio": 0.5, "round_to": 0}, ConfigError, "round_to is 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        SelectionRequest(**options)
