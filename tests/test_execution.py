"""Details of execution: the output they leave as it is, and that they do to the device's queue what they say."""

from typing import Any

from tests.synthetic import synthetic
from tests.test_details import LONG, call
from tests.test_transforms import CONFIGS, error, every_config, run
from zimage import arms, execution, transforms
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.transformer import Transformer

import mlx.core as mx
import pytest

BLOCKS = 1 + 1 + 2  # of CONFIGS["plain"]: noise refiner, context refiner, main blocks
STAGES = BLOCKS + 4
HANDED_OVER = {  # how often a step of that model hands work over, and how often it waits
    "submit_every_block": (BLOCKS, 0),
    "submit_every_2nd": (BLOCKS // 2, 0),
    "submit_every_4th": (BLOCKS // 4, 0),
    "submit_at_the_end": (1, 0),
    "eval_every_block": (0, BLOCKS),
    "eval_every_stage": (0, STAGES),
}


@every_config
@pytest.mark.parametrize("name", execution.TRANSFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_execution_leaves_the_output(name: str, config: TransformerConfig, dtype: str) -> None:
    """The velocity of a ragged batch is the plain one's, bit for bit where nothing is compiled, else to a rounding."""
    model = transforms.cast(synthetic(config), dtype)
    detailed = arms.transformed(model, [name])
    for _ in range(2):
        found = run(detailed)
        if name.startswith("compile_"):
            assert error(found, run(model)) <= (1e-6 if dtype == "float32" else 0.02)
        else:
            assert mx.array_equal(found, run(model))


@pytest.mark.parametrize("name", HANDED_OVER)
def test_a_step_is_handed_over_as_it_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step calls mx.async_eval and mx.eval as often as its detail says, and a second one again so."""
    model = arms.transformed(synthetic(CONFIGS["plain"]), [name])
    assert len([*transforms.blocks(model)]) == BLOCKS
    counted = {"async_eval": 0, "eval": 0}

    def counting(kind: str) -> Any:
        compute = getattr(mx, kind)

        def counted_call(*arrays: Any) -> None:
            counted[kind] += 1
            compute(*arrays)

        return counted_call

    for kind in counted:
        monkeypatch.setattr(mx, kind, counting(kind))
    for _ in range(2):
        counted.update(dict.fromkeys(counted, 0))
        call(model, 20)
        assert (counted["async_eval"], counted["eval"]) == HANDED_OVER[name]


def test_a_whole_step_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step builds its graph once for each set of shapes, follows a replaced weight, and refuses as ever."""
    model = execution.compile_step(synthetic(LONG))
    wanted, built = call(model, 20), []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *given: (built.append(1), forward(self, *given))[1])
    if execution_compiles():
        assert mx.array_equal(call(model, 20), wanted) and built == []
    call(model, 40)
    model.x_pad_token = mx.zeros_like(model.x_pad_token)
    assert error(call(model, 20), wanted) > 1e-4
    with pytest.raises(InputError, match="latents must be an MLX array"):
        model(mx.zeros((1, 3)), mx.array([0.5]), mx.zeros((1, 4, LONG.cap_feat_dim)))


def execution_compiles() -> bool:
    """Whether MLX compiles anything here: where it finds no compiler, a compiled call is a plain one."""
    traced = []
    compiled = mx.compile(lambda x: (traced.append(1), mx.exp(x) + 1)[1])
    mx.eval(compiled(mx.ones(3)), compiled(mx.ones(3)))
    return len(traced) == 1


@pytest.mark.parametrize("other", ["submit_early", "eval_every_stage", "keep_captions", "chunk_feed_forward", "fast"])
def test_a_compiled_step_goes_with_no_queue_of_its_own(other: str) -> None:
    """With a step in parts, barriers or kept captions, before or after, the call is refused in one line."""
    for names in (["compile_step", other], [other, "compile_step"]):
        with pytest.raises(InputError, match="leave compile_step or those transforms out") as caught:
            call(arms.transformed(synthetic(LONG), names), 20)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "two"])
def test_blocks_are_handed_over_in_whole_numbers(count: Any) -> None:
    """Anything but an integer from 1 is refused in one line."""
    with pytest.raises(InputError, match="blocks must be an integer of at least 1"):
        execution.submit_every(synthetic(LONG), count)
