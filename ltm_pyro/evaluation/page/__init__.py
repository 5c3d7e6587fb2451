"""One page of HTML about runs, which needs no network: curves, figures, samples, and texts coloured token by token."""

from ltm_pyro.evaluation.page.content import CodedText, RunContent, content_of
from ltm_pyro.evaluation.page.html import render

__all__ = ["CodedText", "RunContent", "content_of", "render"]
