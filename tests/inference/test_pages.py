"""The examples of docs/schemes.md, run as the page has them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PAGE = (Path(__file__).parents[2] / "docs/schemes.md").read_text()


def run(name: str, **names: Any) -> dict[str, Any]:
    """Run the code behind `<!-- run: NAME -->` with names that are known before it; returns all names after it."""
    (code,) = re.findall(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(code, names)
    return names


def test_a_constrained_z_is_inferred_as_the_page_says():
    """The posterior is Gamma(2 + x, 2), the evidence Γ(2 + x) 2^-(2 + x) / x! = (1 + x) 2^-(2 + x)."""
    after = run("constrained")
    counts, rates, bound = after["counts"], after["rates"], after["bound"]
    assert torch.allclose(rates.mean, (2 + counts) / 2, rtol=0.15)
    exact = (2 + counts) * torch.tensor(2.0).log() - (1 + counts).log()
    assert (bound.nelbo > exact - 4 * bound.monte_carlo_standard_error).all()
    assert (bound.nelbo < exact + 0.1 + 4 * bound.monte_carlo_standard_error).all()


def test_a_guide_of_pyro_is_fitted_and_the_trained_weights_stay(ltm, texts, recwarn):
    before = {name: weight.detach().clone() for name, weight in ltm.named_parameters()}
    torch.manual_seed(0)
    after = run("frozen", ltm=SimpleNamespace(model=ltm), batch=texts)
    assert sum(after["losses"][-10:]) < sum(after["losses"][:10])
    assert after["z"].shape[0] == len(texts)
    assert after["z"].abs().max() > 0.01
    for name, weight in ltm.named_parameters():
        assert torch.equal(weight, before[name]), name
    assert not recwarn.list  # Pyro would warn of each weight
