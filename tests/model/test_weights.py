"""One declaration, many readers: shapes, bytes and the way to a checkpoint and back agree, and no bit is lost on it."""

from __future__ import annotations

import families
import jax
import numpy as np
import pytest
from families import Family

from jaxpaged.model import weights as model_weights

each_family = pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)


@each_family
def test_pack_and_unpack_lose_no_bit(family: Family) -> None:
    tensors = family.tensors()
    for parameter in model_weights.declare(family.config):
        parts = [tensors[name] for name, _ in parameter.parts]
        packed = parameter.pack(parts)
        assert packed.shape == parameter.shape, parameter.name
        assert len(parameter.axes) == len(parameter.shape), parameter.name
        for got, want, (name, shape) in zip(parameter.unpack(packed), parts, parameter.parts, strict=True):
            assert got.shape == shape, name
            assert got.tobytes() == want.tobytes(), name
        assert parameter.pack(parameter.unpack(packed)).tobytes() == packed.tobytes()


@each_family
def test_weights_to_a_checkpoint_and_back(family: Family) -> None:
    config, tensors = family.config, family.tensors()
    weights = model_weights.build(config, lambda parameter: parameter.pack([tensors[name] for name, _ in parameter.parts]))
    back = dict(model_weights.to_hf(weights, config))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_build_and_num_bytes_agree(family: Family, dtype: str) -> None:
    config = family.config
    weights = jax.eval_shape(lambda: model_weights.init(config, jax.random.key(0), dtype))
    built = model_weights.build(config, lambda parameter: jax.ShapeDtypeStruct(parameter.shape, dtype))
    assert jax.tree.structure(weights) == jax.tree.structure(built)
    assert [leaf.shape for leaf in jax.tree.leaves(weights)] == [leaf.shape for leaf in jax.tree.leaves(built)]
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype(dtype)}
    assert model_weights.num_bytes(config, dtype) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    for parameter in model_weights.declare(config):
        assert model_weights.get(built, parameter.path).shape == parameter.shape


def test_the_fused_projection_keeps_each_head_beside_its_keys() -> None:
    """Query head n sits with key/value head n // G, as attention reads it."""
    family = families.FAMILIES[1]
    config, tensors = family.config, family.tensors()
    (qkv,) = [p for p in model_weights.declare(config) if p.path == ("layers", 1, "qkv")]
    packed = qkv.pack([tensors[name] for name, _ in qkv.parts])
    G, H = config.group_size, config.head_dim
    for n in range(config.num_heads):
        rows = tensors["model.layers.1.self_attn.q_proj.weight"][n * H : (n + 1) * H]
        np.testing.assert_array_equal(packed[n // G, n % G], rows)
    for head in range(config.num_kv_heads):
        for place, part in ((G, "k_proj"), (G + 1, "v_proj")):
            rows = tensors[f"model.layers.1.self_attn.{part}.weight"][head * H : (head + 1) * H]
            np.testing.assert_array_equal(packed[head, place], rows)


def test_random_weights_have_their_scale() -> None:
    family = next(family for family in families.FAMILIES if family.name == "llama-biases")
    weights = model_weights.init(family.config, jax.random.key(1))
    assert np.std(weights.embed) == pytest.approx(0.02, rel=0.1)
    assert np.std(weights.layers[0].qkv) == pytest.approx(family.config.hidden_size**-0.5, rel=0.1)
    assert np.std(weights.layers[1].down) == pytest.approx(family.config.intermediate_size**-0.5, rel=0.1)
    assert (np.asarray(weights.norm) == 1).all()
    assert not np.asarray(weights.layers[0].qkv_bias).any()
    again = model_weights.init(family.config, jax.random.key(1))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True))
