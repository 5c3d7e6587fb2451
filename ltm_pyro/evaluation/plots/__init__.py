"""Plots, of a size and in a style for papers: of figures over the steps of inference, and of a comparison."""
