"""The benchmark of validity, at small sizes: on which side of what is known each figure lies."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

spec = importlib.util.spec_from_file_location("validity", Path(__file__).parents[2] / "benchmarks" / "validity.py")
validity = importlib.util.module_from_spec(spec)
sys.modules["validity"] = validity  # Its dataclasses look themselves up there.
spec.loader.exec_module(validity)
validity.NUM_DRAWS = 16  # more would make the standard errors of the figures smaller, and no figure another

SHORT = {"num_steps": 16}
"""The fast steps of the short training here; texts are scored after as many steps as in the benchmark."""
WORLDS = {
    "n=8": lambda: validity.linear_gaussian(8, 32, noise_scale=0.1, num_texts=50),
    "n=64": lambda: validity.linear_gaussian(64, 512, noise_scale=0.3, num_texts=50),
    "tokens": lambda: validity.uniform_tokens(replace(validity.REUSED, **SHORT), num_slow_steps=4, num_texts=16),
}


@pytest.fixture(scope="module", params=WORLDS.values(), ids=WORLDS.keys())
def comparison(request):
    return request.param()


def errors_above(figure, known):
    """By how many standard errors of the difference, text by text, the mean is above what is known."""
    difference = figure - known
    return difference.mean() / (difference.std() / math.sqrt(len(difference)))


def test_the_figure_at_reused_noise_is_too_low_for_a_bound(comparison):
    assert errors_above(comparison.reused, comparison.exact) < -5


def test_the_same_q_scored_with_fresh_noise_is_not(comparison):
    assert errors_above(comparison.rescored, comparison.exact) > 5


def test_a_q_fitted_with_fresh_noise_is_not(comparison):
    assert errors_above(comparison.refitted, comparison.exact) > 5


def test_a_model_trained_with_fresh_noise_claims_nothing_on_random_symbols():
    comparison = validity.uniform_tokens(replace(validity.FRESH, **SHORT), num_slow_steps=20, num_texts=16)
    floor = math.log(16)
    assert torch.allclose(comparison.exact, torch.tensor(floor, dtype=torch.float64))
    for figure in (comparison.rescored, comparison.refitted):
        assert errors_above(figure, floor) > -5
        assert figure.mean() < floor + 0.3


# --- the closed forms


def observations(loadings, noise_scale, num_texts=20):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(num_texts, loadings.shape[1], generator=generator, dtype=torch.float64)
    noise = torch.randn(num_texts, loadings.shape[0], generator=generator, dtype=torch.float64)
    return z @ loadings.T + noise_scale * noise


def test_where_the_posterior_is_mean_field_its_bound_is_the_exact_evidence():
    loadings = torch.tensor([[0.5, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    x = observations(loadings, 0.4)
    exact = validity.neg_log_evidence(loadings, 0.4, x)
    assert torch.allclose(validity.best_mean_field(loadings, 0.4, x), exact, rtol=1e-10)


def test_no_mean_field_q_is_better_than_the_best():
    """Against the minimum that a general optimiser finds."""
    noise_scale = 0.4
    loadings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = observations(loadings, noise_scale)
    mean, log_scale = (torch.zeros(20, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS(
        [mean, log_scale], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def nelbo():
        q = Normal(mean, log_scale.exp())
        at_mean = -Normal(mean @ loadings.T, noise_scale).log_prob(x).sum(-1)
        spread = 0.5 * (q.variance @ loadings.square().sum(0)) / noise_scale**2
        return at_mean + spread + kl_divergence(q, Normal(torch.zeros_like(mean), 1.0)).sum(-1)

    def closure():
        optimizer.zero_grad()
        loss = nelbo().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(validity.best_mean_field(loadings, noise_scale, x), nelbo().detach(), rtol=1e-6)


# --- what is written


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def by_hand():
    """Two texts, so that a mean and its standard error are known."""
    return validity.Comparison(
        "a world, of two texts",
        "nats per datum",
        "exact",
        exact=values(5, 7),
        reused=values(4, 8),
        rescored=values(10, 30),
        refitted=values(9, 11),
        best=values(8, 8),
    )


def test_the_table_has_means_and_standard_errors(by_hand):
    row = validity.table([by_hand]).splitlines()[-1]
    assert row == (
        "| a world, of two texts (nats per datum) | 2 | 6.0 ± 1.0 | 6.0 ± 2.0 | 50% | 20.0 ± 10.0 | 10.0 ± 1.0 "
        "| 8.0 ± 0.0 |"
    )


def test_the_script_prints_its_table_and_writes_it_with_settings_and_figure(by_hand, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validity, "linear_gaussian", lambda *sizes, noise_scale: by_hand)
    monkeypatch.setattr(validity, "uniform_tokens", lambda trained_with: by_hand)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # It would last beyond this test.
    monkeypatch.setattr(sys, "argv", ["validity.py", "--out", str(tmp_path / "results")])
    validity.main()
    printed = capsys.readouterr().out
    assert validity.table([by_hand] * 4) in printed
    assert (tmp_path / "results" / "validity.md").read_text(encoding="utf-8") == printed
    record = json.loads((tmp_path / "results" / "validity.json").read_text(encoding="utf-8"))
    assert record["settings"] == list(validity.SETTINGS)
    assert [c["rescored"] for c in record["comparisons"]] == [{"mean": 20, "standard_error": pytest.approx(10)}] * 4
    assert (tmp_path / "results" / "validity.png").read_bytes().startswith(b"\x89PNG")
