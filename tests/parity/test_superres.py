"""CogView2's super-resolution compared with the published code, from checkpoints converted by the command.

Tokens may differ only where the published code's two best scores are closer than float32 noise.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import build_superres
from cogvideo.cli.main import main
from cogvideo.sampling.config import ROUND_TOP_K
from cogvideo.sampling.superres import draw_fine, redraw
from cogvideo.superres.batch import pad_captions
from cogvideo.superres.grid import redraw_mask
from cogvideo.superres.transformer import SuperresTransformer
from tests.helpers.packs import GOLDEN, Pack, open_pack

VOCABULARY = ["vocab.num_image_tokens=200", "vocab.pad=200", "vocab.newline=201", "vocab.start_of_image=202"]
NOISE = 1e-4
UNUSED = torch.zeros(2, 3600, 2)


def convert(method: str, folder: Path) -> tuple[SuperresTransformer, Pack]:
    pack = open_pack(f"superres_{method}")
    source, ours = GOLDEN / pack.about["sat_checkpoint"], folder / method
    assert main(["convert", "--from", str(source), "--to", str(ours), *VOCABULARY]) == 0
    return build_superres(load_checkpoint(ours), dtype=torch.float32), pack


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuperresTransformer, Pack]:
    return convert("direct", tmp_path_factory.mktemp("direct"))


@pytest.fixture(scope="module")
def iterative(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuperresTransformer, Pack]:
    return convert("iterative", tmp_path_factory.mktemp("iterative"))


def captions_of(model: SuperresTransformer, pack: Pack) -> tuple[Tensor, Tensor]:
    lengths = pack["text_length"].tolist()
    return pad_captions(
        [row[len(row) - n :].tolist() for row, n in zip(pack["text"], lengths, strict=True)], model.config
    )


def ranked(scores: Tensor, rank: Tensor) -> Tensor:
    """The index with the given rank; rank 0 is the highest score."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order.gather(-1, rank.expand(scores.shape[:-1])[..., None])[..., 0]


class Ranks:
    """A sampler that picks clusters and tokens by rank, as in the packs, and records the logits it gets."""

    def __init__(self, clusters: Tensor | None, cluster_rank: Tensor, token_rank: Tensor) -> None:
        self.clusters, self.cluster_rank, self.token_rank = clusters, cluster_rank, token_rank
        self.recorded: list[Tensor] = []

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        some = slice(first := sum(part.shape[1] for part in self.recorded), first + logits.shape[1])
        self.recorded.append(logits)
        if self.clusters is not None:
            mass = logits.new_zeros(*logits.shape[:-1], int(self.clusters.max()) + 1)
            best = ranked(mass.index_add_(-1, self.clusters, logits.softmax(-1)), self.cluster_rank[some])
            logits = logits.masked_fill(self.clusters != best[..., None], float("-inf"))
        return ranked(logits, self.token_rank[some])

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.recorded, dim=1)


@pytest.mark.parametrize("kind", ["greedy", "ranked"])
def test_direct(direct: tuple[SuperresTransformer, Pack], kind: str) -> None:
    model, pack = direct
    row = 496 + torch.arange(3600) if kind == "ranked" else torch.zeros(3600, dtype=torch.int64)
    draw = Ranks(pack["cluster_labels"], row % 6, row % 2)
    tokens = draw_fine(model, *captions_of(model, pack), pack["low_res"].long(), draw, UNUSED)
    logits = draw.logits
    torch.testing.assert_close(logits[:, pack["rows"]], pack["logits"], atol=NOISE, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), pack["logsumexp"], atol=NOISE, rtol=0)
    differing = tokens != pack[kind].long()
    if kind == "greedy":
        assert (logits.argmax(-1) == pack["argmax"].long()).float().mean() > 0.999
        assert (pack["cluster_margin"][differing] < 1e-3).all()
    assert differing.sum() <= 4


@pytest.mark.parametrize("kind", ["greedy", "ranked", "greedy_boxed"])
def test_iterative_rounds(iterative: tuple[SuperresTransformer, Pack], kind: str) -> None:
    """Along the published tokens: each round is fed what the published code had after the round before."""
    model, pack = iterative
    only = pack["input_mask"].bool() if kind == "greedy_boxed" else None
    for number in range(1, 7):
        before = (pack["image"] if number == 1 else pack[f"{kind}.after"][:, number - 2]).long()
        places = redraw_mask(60, number) if only is None else redraw_mask(60, number) & only
        rank = (16 + torch.arange(3600)) * 5 + number - 1 if kind == "ranked" else torch.zeros(3600, dtype=torch.int64)
        draw = Ranks(None, rank, (rank % ROUND_TOP_K[number - 1])[places])
        given = before.clone()
        tokens = redraw(model, *captions_of(model, pack), before, number, draw, UNUSED, only)
        assert torch.equal(before, given), "the caller's tokens stay"
        after = pack[f"{kind}.after"][:, number - 1].long()
        differing = (tokens != after)[:, places]
        gaps = draw.logits.gather(-1, tokens[:, places, None]) - draw.logits.gather(-1, after[:, places, None])
        assert (gaps[..., 0][differing].abs() < NOISE).all()
        assert torch.equal(tokens[:, ~places], after[:, ~places])
        if kind == "greedy":
            assert int(places.sum()) == pack.about["redrawn_per_round"][number - 1]
            shared = [i for i, row in enumerate(pack["round_rows"].tolist()) if places[row]]
            at = places.cumsum(0)[pack["round_rows"][shared]] - 1
            assert shared, "a round of which the pack has no row"
            theirs = pack["greedy.logits"][:, number - 1, shared]
            torch.testing.assert_close(draw.logits[:, at], theirs, atol=NOISE, rtol=0)


def test_number_of_redraws_of_each_place(iterative: tuple[SuperresTransformer, Pack]) -> None:
    _, pack = iterative
    assert torch.equal(sum(redraw_mask(60, number).long() for number in range(1, 7)), pack["rounds_redrawn"].long())
