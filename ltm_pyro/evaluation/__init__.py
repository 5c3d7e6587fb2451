"""Figures of trained models: estimators by name, figures over many texts, their cost, their tables and plots."""
