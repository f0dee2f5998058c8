"""Decoding: caches, schedules, the cluster sampler, backends and the engine that runs them."""
