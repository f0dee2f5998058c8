"""Measures of models and their clips, with their uncertainty, and the HTML report."""
