"""Steps in less memory: blocks on disk, feed-forwards in parts, transforms block by block. Same output, less held."""

import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.checkpoints import CONFIG, write_config, write_sharded, write_single
from tests.checkpoints import tensors as seeded
from tests.sources.test_layouts import comfy
from tests.synthetic import synthetic
from zimage import ablation, arms, inputs, low_memory, saving, transforms, weights
from zimage.config import TransformerConfig
from zimage.errors import InputError, WeightsError
from zimage.inputs import Inputs
from zimage.layers import packed
from zimage.measure import memory
from zimage.measure.memory import peak_bytes
from zimage.quantization import Quantization
from zimage.transformer import State, Transformer, weight_bytes

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

DEEP = TransformerConfig.tiny(n_layers=6, n_refiner_layers=1, dim=96, n_heads=3)  # can be packed by 32
Folder = Callable[..., Path]


def example(config: TransformerConfig, batch: int = 1, length: int = 5, pixels: int = 4) -> Inputs:
    """Noise for a model: latents, timesteps and captions of `length` tokens, each one longer than the one before."""
    keys = mx.random.split(mx.random.key(3), batch + 1)
    captions = [mx.random.normal((length + i, config.cap_feat_dim), key=keys[i]) for i in range(batch)]
    latents = mx.random.normal((batch, config.in_channels, pixels, pixels + 2), key=keys[-1])
    return Inputs(latents, (mx.arange(batch) + 0.5) / batch, captions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of six main blocks."""
    model = synthetic(DEEP)
    return saving.save_transformer(model, tmp_path_factory.mktemp("deep") / "plain", "synthetic")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def same(one: mx.array, other: mx.array) -> bool:
    """Whether two outputs are the same bit for bit."""
    return bool(mx.array_equal(one, other))


def above(model: Transformer, given: Inputs) -> int:
    """What a step holds at most above what is held before it."""
    before = mx.get_active_memory()
    return peak_bytes(lambda: model(*given)) - before


def block_bytes(model: Transformer) -> int:
    """What one main block's weights take."""
    return weight_bytes(model.layers[0])


@pytest.mark.parametrize("ahead", [0, 1, 9])
@pytest.mark.parametrize("resident", [0, 2, 6])
def test_what_is_streamed_computes_the_same(folder: Path, resident: int, ahead: int) -> None:
    """However many blocks stay and are read ahead, every call gives the loaded model's output bit for bit."""
    loaded, streamed = weights.load_transformer(folder), low_memory.streamed(folder, None, resident, ahead)
    for given in (example(DEEP), example(DEEP, batch=3)):
        for _ in range(2):
            assert same(streamed(*given), loaded(*given))


@pytest.mark.parametrize("mode", ["8bit-g32", "4bit-g32", "mxfp4"])
def test_packed_weights_are_streamed_as_they_are_stored(mode: str, folder: Path, tmp_path: Path) -> None:
    """A packed checkpoint streams too, bit for bit, and its blocks take as little memory as they do packed."""
    stored = weights.convert(folder, tmp_path / "packed", "float32", mode)
    loaded, streamed = weights.load_transformer(stored), low_memory.streamed(stored)
    given = example(DEEP, batch=2)
    assert same(streamed(*given), loaded(*given))
    assert weight_bytes(streamed) == weight_bytes(loaded) < weight_bytes(weights.load_transformer(folder))


def test_sharded_and_single_checkpoints_are_streamed(tmp_path: Path) -> None:
    """It does not matter in how many files the tensors of a block lie, nor whether they are cast on the way."""
    config = replace(CONFIG, n_layers=3)
    values = seeded(config)
    given = example(config)
    for write in (write_single, write_sharded):
        source = write(tmp_path / write.__name__, values)
        write_config(source, config)
        for dtype in ("float32", "bfloat16"):
            assert same(low_memory.streamed(source, dtype)(*given), weights.load_transformer(source, dtype)(*given))


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
def test_a_block_is_cast_while_the_device_computes(layout: str, tmp_path: Path) -> None:
    """What is read ahead is ready, cast and split into its rows, before the device is done with what it computes."""
    config = replace(CONFIG, n_layers=3)
    write_config(tmp_path, config)
    path, values = tmp_path / "z_image.safetensors", seeded(config)
    save_file(comfy(values) if layout == "comfy" else values, path)
    x = mx.random.normal((2000, 2000), key=mx.random.key(0))
    mx.eval(x)
    start = time.perf_counter()
    mx.async_eval(busy := x @ x)  # type: ignore[no-untyped-call]
    arrays = weights.Unread.of(path, "bfloat16").arrays("layers.1")
    mx.eval(list(arrays.values()))
    ready_s = time.perf_counter() - start
    mx.eval(busy)
    assert ready_s < 0.7 * (time.perf_counter() - start)
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16}


def test_fused_tensors_of_other_layouts_are_streamed(tmp_path: Path) -> None:
    """A single file in ComfyUI's layout, whose three projections are one tensor, streams as it loads."""
    config = replace(CONFIG, n_layers=3)
    write_config(tmp_path, config)
    path = tmp_path / "z_image.safetensors"
    save_file(comfy(seeded(config)), path)
    given = example(config)
    assert same(low_memory.streamed(path, None, 1)(*given), weights.load_transformer(path)(*given))


def test_blocks_on_disk_take_no_memory_between_steps(folder: Path) -> None:
    """A streamed model holds its other weights only, before and after a step, and a resident block adds its own."""
    gc.collect()
    loaded = weights.load_transformer(folder)
    outside = weight_bytes(loaded) - weight_bytes(loaded.layers)
    one = block_bytes(loaded)
    del loaded
    given = example(DEEP)
    mx.eval(given.latents, given.timestep, given.captions)
    for resident in (0, 2):
        before = mx.get_active_memory()
        model = low_memory.streamed(folder, None, resident)
        for _ in range(2):
            held = mx.get_active_memory() - before
            assert outside + resident * one <= held <= outside + resident * one + 0.1 * one
            mx.eval(model(*given))
        del model
        assert mx.get_active_memory() - before < 0.1 * one


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_reading_ahead_holds_no_more_than_it_says(ahead: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block runs, `ahead` others are being read and no more: weights of 1 + ahead blocks are held at most."""
    model = low_memory.streamed(folder, None, 0, ahead)
    reading: list[list[int]] = []
    take = low_memory.BlockReader.take

    def watched(self: low_memory.BlockReader, number: int) -> dict[str, mx.array]:
        arrays = take(self, number)
        reading.append(self.reading)
        return arrays

    monkeypatch.setattr(low_memory.BlockReader, "take", watched)
    given = example(DEEP)
    mx.eval(model(*given))
    assert reading == [[i for i in range(n + 1, n + 1 + ahead) if i < 6] for n in range(6)]
    one, activations = block_bytes(model), above(weights.load_transformer(folder), given)
    assert above(model, given) == pytest.approx((1 + ahead) * one + activations, abs=0.3 * one)


def test_a_streamed_step_needs_far_less_than_a_loaded_one(folder: Path) -> None:
    """With the same inputs the peak of a streamed step lies below that of a loaded one by four blocks of six."""
    given, peaks = example(DEEP), []
    for make in (weights.load_transformer, low_memory.streamed):
        before = mx.get_active_memory()
        model = make(folder)
        one = block_bytes(model)
        peaks.append(peak_bytes(lambda model=model: model(*given)) - before)
        del model
    assert peaks[0] - peaks[1] == pytest.approx(4 * one, abs=0.3 * one)


def test_a_call_that_was_ended_leaves_nothing_to_the_next(folder: Path) -> None:
    """After a call that stopped between blocks, the next one drops what was read ahead for it and computes the same."""
    loaded, model = weights.load_transformer(folder), low_memory.streamed(folder, None, 0, 2)
    given = example(DEEP)
    stages = model.stages(*given)
    model.through(stages[: [stage.name for stage in stages].index("layers.2") + 1], State(*given))
    reader = model.layers[0].reader
    assert reader.reading == [3, 4]
    assert same(model(*given), loaded(*given))
    assert reader.reading == []


def replaced(path: Path) -> None:
    """Another file of the same length in its place."""
    other = path.with_suffix(".other")
    shutil.copyfile(path, other)
    os.replace(other, path)


def touched(path: Path) -> None:
    """The same file, written to."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "cannot be read: No such file or directory"),
        (lambda path: os.truncate(path, 20_000), "changed while its model was in use; make the model anew"),
        (replaced, "changed while its model was in use"),
        (touched, "changed while its model was in use"),
    ],
)
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_file_that_changes_is_one_line(damage: Callable[[Path], None], words: str, ahead: int, copied: Path) -> None:
    """A file that is gone, cut, replaced or written to between two blocks ends the step with a line that names it."""
    model = low_memory.streamed(copied, None, 0, ahead)
    (path,) = copied.glob("*.safetensors")
    given = example(DEEP)
    mx.eval(model(*given))
    state = State(*given)
    stages = model.stages(*given)
    state = model.through(stages[:-3], state)
    damage(path)
    with pytest.raises(WeightsError) as caught:
        model.through(stages[-3:], state)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_while_it_is_read_is_one_line(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cut short after a block was begun, so that MLX cannot read it, is the same line and no error of MLX's."""
    model = low_memory.streamed(copied, None, 0, 0)
    (path,) = copied.glob("*.safetensors")
    begin = low_memory.BlockReader._begin

    def cut(self: low_memory.BlockReader, number: int) -> None:
        if number == 1:
            self._require_unchanged(number)
            self._reading[number] = self._unread.arrays(f"layers.{number}")
            os.truncate(path, 20_000)
        else:
            begin(self, number)

    monkeypatch.setattr(low_memory.BlockReader, "_begin", cut)
    with pytest.raises(WeightsError, match="changed while its model was in use"):
        model(*example(DEEP))


@pytest.mark.parametrize(
    "names", [["fast"], ["chunk_feed_forward"], ["keep_captions", "join_blocks", "compile_blocks"]]
)
def test_other_transforms_keep_blocks_on_disk(names: list[str], folder: Path) -> None:
    """Transforms that make no new weights work on a streamed model; it stays on disk and computes the same."""
    loaded, model = weights.load_transformer(folder), low_memory.streamed(folder, None, 2)
    changed, given = arms.transformed(model, names), example(DEEP, batch=2)
    assert low_memory_error(changed(*given), arms.transformed(loaded, names)(*given)) < 1e-5
    before = mx.get_active_memory()
    for _ in range(2):
        mx.eval(changed(*given))
    assert mx.get_active_memory() - before < 0.5 * block_bytes(model)


def low_memory_error(found: mx.array, wanted: mx.array) -> float:
    """The relative L2 error."""
    error: Any = (mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)).item()
    return float(error)


@pytest.mark.parametrize(
    "change",
    [
        transforms.fuse_qkv,
        transforms.fuse_gate_up,
        transforms.with_all_ones_mask,
        transforms.tensors,
        lambda model: transforms.quantize(model, "8bit"),
        lambda model: transforms.cast(model, "bfloat16"),
        lambda model: transforms.adapt(model, []),
        lambda model: transforms.float16(model, example(DEEP)),
        lambda model: arms.transformed(model, ["tuned"], example(DEEP)),
    ],
)
def test_new_weights_are_not_made_of_blocks_on_disk(change: Callable[[Transformer], Any], folder: Path) -> None:
    """What would have to read all blocks is refused, in one line that says what to do, and nothing is read."""
    model = low_memory.streamed(folder)
    before = mx.get_active_memory()
    with pytest.raises(InputError, match=r"stay on disk; .* convert its source") as caught:
        change(model)
    assert "\n" not in str(caught.value)
    assert mx.get_active_memory() - before < 0.01 * block_bytes(model)


def test_a_step_in_parts_is_not_compiled_as_a_whole(folder: Path) -> None:
    """Blocks on disk and feed-forwards in parts refuse `compile_step` in one line, before anything is read."""
    streamed, plain = low_memory.streamed(folder), weights.load_transformer(folder)
    for model, names in ((streamed, ["compile_step"]), (plain, ["chunk_feed_forward", "compile_step"])):
        before = mx.get_active_memory()
        with pytest.raises(InputError, match="compiled as a whole cannot be handed over in parts"):
            arms.transformed(model, names)(*example(DEEP))
        assert mx.get_active_memory() - before < 0.1 * block_bytes(plain)


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [
        ("synthetic:tiny", {}, "synthetic:tiny has no files to read; write them first: zimage convert"),
        ("digits", {"resident": 4}, "resident must be an integer from 0 to 3, found 4"),
        ("digits", {"resident": 0.5}, "resident must be an integer from 0 to 3, found 0.5"),
        ("digits", {"ahead": -1}, "ahead must be an integer of at least 0, found -1"),
        ("digits", {"dtype": "float64"}, "dtype 'float64' is not supported"),
    ],
)
def test_what_cannot_be_streamed_is_refused(source: str, given: dict[str, Any], words: str) -> None:
    """A source without files and arguments out of range are one clear line."""
    with pytest.raises(InputError) as caught:
        low_memory.streamed(source, **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [1, 7, 32, 64, 10_000])
@pytest.mark.parametrize("batch", [1, 3])
def test_feed_forwards_in_parts_compute_the_same(rows: int, batch: int) -> None:
    """Parts that divide the tokens or not, of one image or a ragged batch, change the output by rounding at most."""
    model = synthetic(DEEP)
    given = example(DEEP, batch, pixels=8)
    assert low_memory_error(low_memory.chunk_feed_forward(model, rows)(*given), model(*given)) < 1e-6


@pytest.mark.parametrize("before", [[], ["fuse_gate_up"], ["fuse_swiglu"], ["fast"], ["compile_blocks"]])
@pytest.mark.parametrize("packing", [None, "8bit-g32"])
def test_parts_compose_with_other_transforms(before: list[str], packing: str | None) -> None:
    """Fused, packed and compiled models compute in parts too, whichever transform comes first, and fusing undone."""
    model = synthetic(DEEP) if packing is None else transforms.quantize(synthetic(DEEP), packing)
    given = example(DEEP, 2)
    wanted = model(*given)
    for names in ([*before, "chunk_feed_forward"], ["chunk_feed_forward", *before]):
        changed = arms.transformed(model, names)
        for _, block in transforms.blocks(changed):
            assert block.feed_forward.rows_at_once == 1024 and not block.compiles
            block.feed_forward.rows_at_once = 16
        assert low_memory_error(changed(*given), wanted) < 1e-5
        assert low_memory_error(transforms.unfuse(changed)(*given), wanted) < 1e-5


def test_parts_hold_less_than_the_whole() -> None:
    """A feed-forward of many rows holds far less in parts: not its three hidden arrays, but two parts of each."""
    config = replace(DEEP, n_layers=1)
    whole = synthetic(config).layers[0].feed_forward
    parts = low_memory.chunk_feed_forward(synthetic(config), 64).layers[0].feed_forward
    x = mx.random.normal((1, 4096, config.dim))
    mx.eval(x)
    before = mx.get_active_memory()
    most, less = (peak_bytes(lambda call=call: call(x)) - before for call in (whole, parts))
    hidden = 4 * 4096 * config.hidden_dim
    assert most > 2 * hidden
    assert less < 2 * x.nbytes + 0.3 * hidden


def test_parts_need_a_positive_number_of_rows() -> None:
    """Rows below 1, or of another type, are refused in one line."""
    for rows in (0, True, 1.5, "8"):
        with pytest.raises(InputError, match="rows must be an integer of at least 1, found"):
            low_memory.chunk_feed_forward(synthetic(CONFIG), rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("transform", [transforms.fuse_qkv, transforms.fuse_gate_up])
def test_transforms_go_block_by_block(transform: Callable[[Transformer], Transformer]) -> None:
    """The result is the transform's own, bit for bit, in the model that was given up; at most a block lies beside."""
    given = example(DEEP)
    wanted = transform(synthetic(DEEP))
    kept = dict(tree_flatten(wanted.parameters()))
    own = Transformer(DEEP)
    mx.eval(own.parameters())
    one, before = block_bytes(own), mx.get_active_memory()
    peak = peak_bytes(lambda: low_memory.block_by_block(own, transform).parameters()) - before
    assert peak < one
    found = dict(tree_flatten(own.parameters()))
    assert found.keys() == kept.keys() and all(same(found[name], kept[name]) for name in kept)
    assert same(own(*given), wanted(*given))


def test_a_transform_that_fails_leaves_a_model_that_works() -> None:
    """Where a block cannot be changed, it and all after it are as they were, and the model computes what it did."""
    model, given = synthetic(DEEP), example(DEEP)
    odd = model.layers[2].attention
    odd.to_k = packed(odd.to_k, Quantization("affine", 8, 32))
    wanted = model(*given)
    with pytest.raises(InputError, match="must be stored alike"):
        low_memory.block_by_block(model, transforms.fuse_qkv)
    assert "to_qkv" in model.layers[1].attention and "to_q" in model.layers[2].attention
    assert low_memory_error(model(*given), wanted) < 1e-5


def test_only_what_changes_each_block_for_itself_goes_block_by_block() -> None:
    """Another transform is refused in one line, before anything of the model is changed."""
    model = synthetic(CONFIG)
    for other in (transforms.join_blocks, lambda model: model):
        with pytest.raises(InputError, match=r"takes zimage\.transforms\.fuse_qkv or fuse_gate_up") as caught:
            low_memory.block_by_block(model, other)
        assert "\n" not in str(caught.value)
    assert model.layers[0] is not None


def test_a_copy_leaves_blocks_on_disk(folder: Path) -> None:
    """A copy for a noise floor has other arrays for what is in memory, reads no block, and computes the same."""
    model = low_memory.streamed(folder, None, 1)
    before, given = mx.get_active_memory(), example(DEEP)
    copy = ablation.copied(model)
    assert mx.get_active_memory() - before < weight_bytes(model) - 4.5 * block_bytes(model)
    assert copy.layers[0].attention.to_q.weight is not model.layers[0].attention.to_q.weight
    assert [block.streamed for block in copy.layers] == [False] + [True] * 5
    assert same(copy(*given), model(*given))


def test_what_stays_in_memory_must_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident blocks and those read ahead must find room on the device, as a loaded model must; else it is a line."""
    one = block_bytes(synthetic(DEEP))
    outside = weight_bytes(synthetic(DEEP)) - 6 * one
    real = memory.device()
    monkeypatch.delenv("ZIMAGE_FORCE", raising=False)
    monkeypatch.setattr(memory, "device", lambda: real | {"memory_bytes": outside + 3 * one})
    for resident, ahead in ((1, 1), (0, 2), (2, 0)):
        assert low_memory.streamed(folder, None, resident, ahead)
    for resident, ahead in ((1, 2), (2, 1), (6, 0)):
        with pytest.raises(
            InputError, match=r"its weights in memory take .* let fewer blocks stay there, or set"
        ) as caught:
            low_memory.streamed(folder, None, resident, ahead)
        assert "\n" not in str(caught.value)


def test_an_order_holds_what_it_leaves_lying_about() -> None:
    """Keeping the plain model beside the fused one holds more than never having both; other names are refused."""
    from zimage import orders

    case = orders.Case("digits", "", "", "float32", 8, 8, 1, 1, 0, "cpu")
    names = ["load, step", "load, fuse, step", "load, fuse block by block, step"]
    rows = orders.peaks(case, names)
    peaks = {row["arm"]: row["bytes"] for row in rows if row["metric"] == "peak_bytes"}
    loaded = weights.load_transformer("digits", "float32")
    whole, fused = weight_bytes(loaded), [*transforms.blocks(arms.transformed(loaded, ["fuse_qkv", "fuse_gate_up"]))]
    plain, kept, gradual = (peaks[name] for name in names)
    assert whole < plain < kept and whole < gradual < kept
    assert {row["stage"] for row in rows} == {"process"}
    held = {row["arm"]: row["bytes"] for row in rows if row["metric"] == "weight_bytes"}
    stacked = weight_bytes([b.attention.to_qkv for _, b in fused]) + weight_bytes(
        [b.feed_forward.w13 for _, b in fused]
    )
    assert [held[name] for name in names] == [whole, whole + stacked, whole]  # what both models have counts once
    with pytest.raises(InputError, match="order 'load, pack, step' is not known; known are 'load, step', "):
        orders.peaks(case, ["load, pack, step"])


def test_an_order_that_fails_is_one_line(tmp_path: Path) -> None:
    """What goes wrong in an order's process is told in a line that names the order and the reason."""
    from zimage import orders
    from zimage.errors import MeasurementError

    case = orders.Case(str(tmp_path / "nothing"), "", "", "float32", 8, 8, 1, 1, 0, "cpu")
    with pytest.raises(MeasurementError, match=r"the order 'load, step' failed \(1\): no checkpoint at"):
        orders.peaks(case, ["load, step"])


def test_inputs_are_those_of_notebooks() -> None:
    """A streamed digits model draws what the loaded one does, with the inputs that notebooks give."""
    loaded, model = weights.load_transformer("digits"), low_memory.streamed("digits")
    given = inputs.example(loaded, "digits", 8, 8, 2, 1, 0)
    assert same(model(*given), loaded(*given))
