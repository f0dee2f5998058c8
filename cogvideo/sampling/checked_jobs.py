"""Jobs from what users ask for, checked as a whole before anything is drawn. It reads no command line and no page."""

from collections.abc import Sequence
from dataclasses import replace

from cogvideo.rng import SampleKey, sample_keys
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.inputs import Footage
from cogvideo.sampling.jobs import ClipJob, InterpolationJob, UpsampleJob
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.superres import Upsampler


def clip_job(
    pipeline: Pipeline,
    config: SampleConfig,
    prompts: Sequence[str],
    given: Footage | None,
    seen: dict[str, int] | None = None,
) -> ClipJob:
    """The clips of these prompts; without a prompt, of the captions that the given frames came with.

    `seen`: as of `uniforms.sample_keys`, as a repeated prompt means another sample of it.
    Raises: ValueError for a prompt that is empty or too long, or given frames that are not one for each clip.
    """
    if not prompts and given is not None:
        keys = [SampleKey(config.seed, *sample) for sample in given.samples]
    else:
        keys = sample_keys(config.seed, prompts, config.samples_per_prompt, seen)
    pipeline.texts([key.caption for key in keys], config)  # every prompt fits, or nothing begins
    if given is None:
        return ClipJob(pipeline, config, keys)
    clips = len(given.tokens)
    if clips not in (1, len(keys)):
        raise ValueError(f"the given file holds {clips} clips, but {len(keys)} are asked for; give as many prompts")
    return ClipJob(pipeline, config, keys, given.tokens.expand(len(keys), -1, -1))


def interpolation_job(
    pipeline: Pipeline, config: SampleConfig, footage: Footage, caption: str | None
) -> InterpolationJob:
    """Raises: ValueError if there is nothing to do, nobody says what is shown, or a caption is too long."""
    if config.rounds < 1:
        raise ValueError("rounds=0 puts no frame between any; give at least 1")
    if footage.num_frames < 2:
        raise ValueError(f"there is nothing between {footage.num_frames} frame; interpolation takes at least 2")
    keys = _keys_of(footage, caption, config.seed)
    config = config if footage.seconds is None else replace(config, seconds=footage.seconds)
    pipeline.round_texts(config, [key.caption for key in keys], footage.num_frames)  # all fit, or nothing begins
    return InterpolationJob(pipeline, config, keys, footage.tokens)


def upsample_job(upsampler: Upsampler, footage: Footage, caption: str | None) -> UpsampleJob:
    """Raises: ValueError if nobody says what is shown, or a caption is empty."""
    keys = _keys_of(footage, caption, upsampler.config.seed)
    if not all(key.caption.strip() for key in keys):
        raise ValueError("the caption is empty; describe what the input shows")
    seconds = footage.seconds or float(max(footage.num_frames - 1, 1))  # pictures: one a second
    return UpsampleJob(upsampler, keys, footage.tokens, seconds)


def _keys_of(footage: Footage, caption: str | None, seed: int) -> list[SampleKey]:
    """Whose clips the input's are: the caption's, if one is given, else as saved tokens say. Raises: ValueError."""
    if caption is not None:
        return sample_keys(seed, [caption], len(footage.tokens))
    if not footage.samples:
        raise ValueError("nobody says what the input shows; give --caption")
    return [SampleKey(seed, *sample) for sample in footage.samples]
