"""From captions to videos: bundles of weights, both stages, super-resolution, results. Import the submodules."""
