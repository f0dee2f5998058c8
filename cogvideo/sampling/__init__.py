"""From captions to frames: schedules, decoding engine, token sampler, both stages, pipeline. Import the submodules."""
