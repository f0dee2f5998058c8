"""Runs code for GPUs on a machine without one: tensors on "cuda" have shapes, types and a device, but no values.

What this proves: no operation mixes devices, and nothing waits for the GPU (a host sync) but where it is expected. What
it does not: values, kernels, memory.
"""
