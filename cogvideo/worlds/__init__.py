"""Synthetic worlds: captioned videos whose ground truth is known, and benchmarks on them."""
