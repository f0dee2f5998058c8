"""A few moving digits made on the spot, as clips of tokens: to try training with no files prepared. Not a benchmark."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvideo.data.encode import TokenEncoder
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.worlds.digits.files import clips_of
from cogvideo.worlds.digits.render import render


class EmbeddedClips:
    """As `ClipDataset`, from nothing but an image tokenizer; clip i is the same at every start."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        count: int,
        *,
        clip_seconds: Sequence[float] | None = None,
        num_frames: int = 5,
        seed: int = 0,
    ) -> None:
        lengths = sorted(clip_seconds or (4.0, 2.0, 1.0))
        self.num_tokens, self.num_frames = tokenizer.num_tokens, num_frames
        self.seconds: NDArray[np.float32] = np.resize(np.array(lengths, np.float32), count)
        self._captions, frames = [], []
        for (clip, language), seconds in zip(clips_of("train", count, seed), self.seconds, strict=True):
            self._captions.append(clip.caption(language))
            frames.append(render(clip, np.linspace(0.0, float(seconds), num_frames)))
        tokens = TokenEncoder(tokenizer)(np.concatenate(frames))
        self._tokens = tokens.reshape(count, num_frames, -1).astype(np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def frame_len(self) -> int:
        """Tokens a frame."""
        return self._tokens.shape[2]

    def frames(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens of several clips: (len(indices), num_frames, frame_len)."""
        return self._tokens[np.asarray(indices)]

    def texts(self, indices: ArrayLike) -> list[tuple[float, str]]:
        """Lengths and captions of several clips."""
        return [(float(self.seconds[i]), self._captions[i]) for i in np.asarray(indices)]
