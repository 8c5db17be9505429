"""The encoder: its sizes, and what its features may and may not depend on.

Shape suffixes: B samples, L tokens, K patches, P values a patch, D width.
"""

from pathlib import Path

import pytest
import torch
from tiny_data import shape_of, tiny_settings
from torch import Tensor

from mnemos.engine.decoder import DecoderBlock
from mnemos.engine.encoder import Encoder, EncoderShape, block_parameters, pooled
from mnemos.engine.objectives import Pretrainer
from mnemos.engine.positions import interpolate_table, sin_cos_table
from mnemos.engine.presets import PRESETS
from mnemos.engine.settings import resolve
from mnemos.kernels.packing import Packing

MILLIONS = {  # of the blocks
    "sample": 2.67,
    "base": 85.1,
    "large": 302.3,
    "huge": 629.8,
    "giant": 1010.1,
    "official": 85.1,
}
GRIDS = {"image": (8, 8), "volume": (1, 8, 8)}


@pytest.fixture
def shape(tiny_sets: Path) -> EncoderShape:
    return shape_of(tiny_settings(model__layer_scale=0.5), tiny_sets)


@pytest.fixture
def encoder(shape: EncoderShape) -> Encoder:
    torch.manual_seed(0)
    return Encoder(shape).eval()


def patches(shape: EncoderShape, kind: str, batch: int, count: int) -> Tensor:
    values = shape.image_patch**2 * shape.channels if kind == "image" else shape.volume_patch**3
    return torch.randn(batch, count, values)


def places(batch: int, count: int) -> Tensor:
    return torch.arange(count).expand(batch, -1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_size_it_says(preset: str) -> None:
    settings = resolve(preset, {})
    with torch.device("meta"):
        model = Pretrainer(Encoder(shape_of(settings)), settings)
    count = block_parameters(list(model.encoder.blocks)) / 1e6
    assert count == pytest.approx(MILLIONS[preset], abs=0.1 if count > 10 else 0.005)


def test_the_official_preset_holds_what_the_published_files_hold() -> None:
    # 300 tensors, 199,205,635 values, of which encoder, tokenizers and CLS are 132,330,240
    settings = resolve("official", {})
    with torch.device("meta"):
        model = Pretrainer(Encoder(shape_of(settings)), settings)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 132_330_240
    assert sum(parameter.numel() for parameter in model.parameters()) == 199_205_635
    assert len(list(model.parameters())) == 300


def test_texts_look_to_the_left_only_in_the_authors_arithmetic(tiny_sets: Path) -> None:
    ids = torch.randint(3, 200, (9,))
    other = ids.clone()
    other[6:] = ids[6:] + 1
    for official in (False, True):
        torch.manual_seed(0)
        settings = tiny_settings(model__official=official, model__layer_scale=0.5)
        encoder = Encoder(shape_of(settings, tiny_sets)).eval()
        (first,), (second,) = read_texts(encoder, [ids]), read_texts(encoder, [other])
        assert torch.equal(first[:6], second[:6]) == official
        assert not torch.equal(first[6:], second[6:])


def test_positions_of_the_authors_are_rows_by_patch_number(tiny_sets: Path) -> None:
    encoder = Encoder(shape_of(tiny_settings(model__official=True), tiny_sets)).eval()
    tokenizer = encoder.tokenizers["image"]
    values = torch.zeros(1, 2, 192)
    tokens = tokenizer(values, torch.tensor([[5, 70]]), (16, 16))
    expected = tokenizer.project.bias + tokenizer.position[[5, 70]] + tokenizer.depth[0]
    assert torch.equal(tokens[0], expected)


def test_a_fresh_model_is_whole(tiny_sets: Path, shape: EncoderShape) -> None:
    # uninitialised memory holds NaN here: a tensor that nobody filled would show
    model = Pretrainer(Encoder(shape), tiny_settings())
    broken = [
        name
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if not value.isfinite().all()
    ]
    assert not broken
    assert all(
        (block.scale_1 == 0.5).all() and (block.scale_2 == 0.5).all() for block in model.encoder.blocks
    )


@pytest.mark.parametrize("kind", GRIDS)
def test_every_kind_has_its_own_sequence(encoder: Encoder, kind: str) -> None:
    features = encoder.forward_patches(kind, patches(encoder.shape, kind, 2, 16), places(2, 16), GRIDS[kind])
    assert features.shape == (2, 17, 32) and features.isfinite().all()
    assert not torch.allclose(features[0], features[1])


@pytest.mark.parametrize("kind", GRIDS)
def test_visible_patches_may_come_in_any_order(encoder: Encoder, kind: str) -> None:
    values, ids = (
        patches(encoder.shape, kind, 2, 16),
        torch.stack([torch.randperm(64)[:16] for _ in range(2)]),
    )
    order = torch.randperm(16)
    plain = encoder.forward_patches(kind, values, ids, GRIDS[kind])
    turned = encoder.forward_patches(kind, values[:, order], ids[:, order], GRIDS[kind])
    torch.testing.assert_close(turned[:, 1:], plain[:, 1:][:, order])
    torch.testing.assert_close(turned[:, 0], plain[:, 0])
    moved = encoder.forward_patches(kind, values, (ids + 1) % 64, GRIDS[kind])
    assert not torch.allclose(moved, plain, atol=1e-4), "but their places matter"


def test_samples_do_not_meet(encoder: Encoder) -> None:
    values = patches(encoder.shape, "image", 3, 16)
    whole = encoder.forward_patches("image", values, places(3, 16), (8, 8))
    alone = encoder.forward_patches("image", values[1:2], places(1, 16), (8, 8))
    torch.testing.assert_close(whole[1:2], alone)


# Texts


def read_texts(encoder: Encoder, texts: list[Tensor], keep: Tensor | None = None) -> list[Tensor]:
    """Return the features of each text, read in one packed batch."""
    lengths = [len(ids) for ids in texts]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packing = Packing(offsets_B1=bounds.int(), longest=max(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    features = encoder.forward_text(torch.cat(texts), position, packing, keep)
    torch.testing.assert_close(
        pooled(features, packing), torch.stack([part.mean(0) for part in features[0].split(lengths)])
    )
    return list(features[0].split(lengths))


def test_a_text_does_not_know_the_others(encoder: Encoder) -> None:
    texts = [torch.randint(3, encoder.shape.vocab, (length,)) for length in (3, 40, 17, 1)]
    together = read_texts(encoder, texts)
    for ids, features in zip(texts, together, strict=True):
        torch.testing.assert_close(features, read_texts(encoder, [ids])[0])
    others = [texts[0], *(ids.flip(0) for ids in texts[1:])]
    torch.testing.assert_close(read_texts(encoder, others)[0], together[0])


def test_texts_are_read_in_both_directions(encoder: Encoder) -> None:
    ids = torch.randint(3, encoder.shape.vocab, (12,))
    (plain,) = read_texts(encoder, [ids])
    for place in (0, 11):
        changed = ids.clone()
        changed[place] = 3 if ids[place] != 3 else 4
        (features,) = read_texts(encoder, [changed])
        assert (features - plain).abs().amax(dim=1).min() > 1e-6, f"every token sees token {place}"


def test_words_have_places(encoder: Encoder) -> None:
    ids = torch.tensor([5, 6, 7, 8])
    (plain,), (turned,) = read_texts(encoder, [ids]), read_texts(encoder, [ids.flip(0)])
    assert (plain - turned.flip(0)).abs().amax(dim=1).min() > 1e-4


def test_a_texts_branches_have_their_own_factors(encoder: Encoder) -> None:
    texts = [torch.randint(3, encoder.shape.vocab, (length,)) for length in (3, 8, 5)]
    keep = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 2.0]])
    together = read_texts(encoder, texts, keep)
    for number, ids in enumerate(texts):
        (alone,) = read_texts(encoder, [ids], keep[number : number + 1])
        torch.testing.assert_close(together[number], alone)
    tokens = encoder.tokenizers["text"](texts[1], torch.arange(8))
    assert torch.equal(together[1], tokens), "nothing was added"


def test_an_encoder_without_texts_says_so() -> None:
    encoder = Encoder(shape_of(tiny_settings()))
    with pytest.raises(ValueError, match="without texts"):
        read_texts(encoder, [torch.ones(2, dtype=torch.int64)])


# Pooling


def test_cls_is_left_out_of_pooling() -> None:
    features = torch.randn(3, 9, 4)
    loud = features.clone()
    loud[:, 0] = 1e6
    assert torch.equal(pooled(features, None), pooled(loud, None))
    torch.testing.assert_close(pooled(features, None), features[:, 1:].mean(dim=1))
    assert pooled(features.bfloat16(), None).dtype == torch.float32


# What a block is made of


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_blocks_compile_as_a_whole(encoder: Encoder, packed: bool) -> None:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = encoder.blocks[1].to(device)
    decoder_block = DecoderBlock(32, 2, "auto").to(device)
    g = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(2, 12, 32, generator=g).to(device) for _ in range(2))
    packing, keep = None, torch.tensor([0.0, 2.0], device=device)
    if packed:
        x, branch = x.view(1, 24, 32), branch.view(1, 24, 32)
        ends = torch.tensor([0, 9, 10, 24], dtype=torch.int32, device=device)
        packing, keep = Packing(offsets_B1=ends, longest=14), keep.repeat_interleave(12)
    scale = torch.linspace(0.1, 1.0, 32, device=device)

    def run(x: Tensor, branch: Tensor) -> Tensor:
        x, branch, scale_2 = block(x, (branch, scale, keep), keep, packing)
        if not packed:
            x, branch = decoder_block(x, branch)
        return (x + branch * scale_2).square().sum()

    found = []
    for fn in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, branch)]
        parameters = list(block.parameters())
        value = fn(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, [*leaves, *parameters])])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_nothing_is_a_convolution(shape: EncoderShape) -> None:
    """With kernel = stride a convolution is a matrix product that cuDNN may do a thousand times slower."""
    model = Pretrainer(Encoder(shape), tiny_settings())
    assert not [name for name, part in model.named_modules() if "Conv" in type(part).__name__]


# DropPath and recomputation


def test_a_dropped_branch_leaves_the_sample_as_it_was(encoder: Encoder) -> None:
    values, ids = patches(encoder.shape, "image", 2, 16), places(2, 16)
    keep = torch.zeros(2, 2 * encoder.shape.depth)
    tokens = encoder.stem(encoder.tokenizers["image"](values, ids, (8, 8)))
    assert torch.equal(encoder.forward_patches("image", values, ids, (8, 8), keep), tokens)
    keep[1] = 1.0
    mixed = encoder.forward_patches("image", values, ids, (8, 8), keep)
    assert torch.equal(mixed[0], tokens[0])
    torch.testing.assert_close(mixed[1], encoder.forward_patches("image", values, ids, (8, 8))[1])


@pytest.mark.parametrize(
    ("column", "scale"), [(0, "0.scale_1"), (1, "0.scale_2"), (2, "1.scale_1"), (3, "1.scale_2")]
)
def test_each_branch_has_its_own_factor(encoder: Encoder, column: int, scale: str) -> None:
    values, ids = patches(encoder.shape, "image", 2, 16), places(2, 16)
    keep = torch.ones(2, 4)
    keep[:, column] = 2.0
    dropped = encoder.forward_patches("image", values, ids, (8, 8), keep)
    with torch.no_grad():
        encoder.blocks.get_parameter(scale).mul_(2.0)
    torch.testing.assert_close(dropped, encoder.forward_patches("image", values, ids, (8, 8)))


def test_recomputation_changes_nothing_but_memory(encoder: Encoder) -> None:
    values, ids = patches(encoder.shape, "volume", 2, 16), places(2, 16)
    keep = torch.tensor([[2.0, 0.0, 2.0, 2.0], [0.0, 2.0, 2.0, 0.0]])
    found = []
    for recompute in (False, True):
        encoder.recompute = recompute
        encoder.zero_grad()
        features = encoder.forward_patches("volume", values, ids, (1, 8, 8), keep)
        features.square().sum().backward()
        gradients = {
            name: value.grad.clone() for name, value in encoder.named_parameters() if value.grad is not None
        }
        found.append((features.detach(), gradients))
    (plain, plain_gradients), (again, again_gradients) = found
    assert torch.equal(plain, again) and plain_gradients.keys() == again_gradients.keys()
    assert all(torch.equal(plain_gradients[name], again_gradients[name]) for name in plain_gradients)


# Positions


@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 6)])
def test_positions_of_the_own_grid_are_the_table(grid: tuple[int, ...]) -> None:
    table = torch.randn(int(torch.tensor(grid).prod()), 5)
    assert interpolate_table(table, grid, grid) is table


@pytest.mark.parametrize(
    ("grid", "to"),
    [((4, 6), (8, 12)), ((2, 4, 4), (6, 8, 8)), ((2, 4, 4), (6, 4, 4)), ((1, 4, 4), (4, 8, 8))],
)
def test_positions_interpolate_along_their_axes(grid: tuple[int, ...], to: tuple[int, ...]) -> None:
    axes = torch.meshgrid(*(torch.arange(size) + 0.5 for size in grid), indexing="ij")
    table = torch.stack([axis.flatten() / size for axis, size in zip(axes, grid, strict=True)], dim=1)
    table = torch.cat([table, torch.ones(len(table), 1)], dim=1)
    wanted = torch.meshgrid(*(torch.arange(size) + 0.5 for size in to), indexing="ij")
    found = interpolate_table(table, grid, to).reshape(*to, len(to) + 1)
    torch.testing.assert_close(found[..., -1], torch.ones(to))
    inner = tuple(slice(size // 4 + 1, size - size // 4 - 1) if size > 4 else slice(None) for size in to)
    for number, (axis, size, old) in enumerate(zip(wanted, to, grid, strict=True)):
        if old > 2:  # a ramp stays a ramp away from the border
            torch.testing.assert_close(found[..., number][inner], (axis / size)[inner], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "grid"), [("image", (16, 12)), ("volume", (4, 12, 12)), ("volume", (1, 16, 16))]
)
def test_larger_inputs_run_and_every_place_is_told_apart(
    encoder: Encoder, kind: str, grid: tuple[int, ...]
) -> None:
    count = int(torch.tensor(grid).prod())
    values = torch.zeros(1, count, patches(encoder.shape, kind, 1, 1).shape[2])
    tokens = encoder.tokenizers[kind](values, places(1, count), grid)[0]
    near = (tokens[:, None] - tokens[None]).abs().amax(dim=2) + torch.eye(count)
    if kind == "image" or grid[0] == 1:  # a table of one depth cannot tell depths apart
        assert near.min() > 1e-4
    assert encoder.forward_patches(kind, values, places(1, count), grid).isfinite().all()


@pytest.mark.parametrize(
    ("grid", "width"), [((8, 8), 32), ((1, 12, 12), 512), ((2, 3, 4), 32), ((14, 14), 512)]
)
def test_fixed_positions_are_distinct_and_bounded(grid: tuple[int, ...], width: int) -> None:
    table = sin_cos_table(grid, width)
    assert table.shape == (int(torch.tensor(grid).prod()), width) and table.abs().max() <= 1
    assert torch.pdist(table).min() > 0.1
    per_axis = width // len(grid) // 2 * 2
    assert (table[:, per_axis * len(grid) :] == 0).all()
    first = table.reshape(*grid, width)[..., :per_axis]
    assert torch.equal(first, first[(slice(None), *([slice(0, 1)] * (len(grid) - 1)))].expand_as(first)), (
        "an axis each"
    )


def test_grids_follow_the_presets_sizes() -> None:
    base = shape_of(resolve("base", {}))
    assert (base.image_grid, base.volume_grid) == ((14, 14), (1, 12, 12))
    sample = shape_of(resolve("sample", {}))
    assert (sample.image_grid, sample.volume_grid, sample.vocab) == ((8, 8), (1, 8, 8), 0)
