"""Whole trainings as lists of `cogvideo` commands: what to run for given data on a given machine, and how to run it."""
