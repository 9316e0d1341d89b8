"""The block arithmetic, against counted positions."""

import pytest
from hypothesis import given, strategies as st

from drawing import geometries
from nsa.geometry import BlockGeometry


def test_defaults_are_the_papers():
    assert BlockGeometry().as_tuple() == (32, 16, 64, 16, 1, 2, 512)


def test_overlap_weights_of_the_default_geometry():
    geometry = BlockGeometry()
    assert geometry.overlap_weights == (1, 2, 2, 2, 1)
    assert geometry.overlap_start == -1
    assert geometry.strides_per_select == 4


@given(geometries(), st.integers(0, 6))
def test_overlap_stencil_equals_counted_positions_for_every_block(geometry, j):
    size, stride, block = geometry.compress_block_size, geometry.compress_stride, geometry.select_block_size
    first = j * geometry.strides_per_select + geometry.overlap_start
    stencil = {first + o: weight for o, weight in enumerate(geometry.overlap_weights)}
    for i in range((j + 3) * block):
        counted = len(set(range(i * stride, i * stride + size)) & set(range(j * block, (j + 1) * block)))
        assert stencil.get(i, 0) * stride == counted


@given(geometries(), st.integers(0, 200))
def test_num_compressed_counts_complete_blocks(geometry, length):
    starts = range(0, max(length, 1), geometry.compress_stride)
    complete = [s for s in starts if s + geometry.compress_block_size <= length]
    assert geometry.num_compressed(length) == len(complete) <= geometry.max_num_compressed(length)


@given(geometries(), st.lists(st.integers(0, 50), max_size=6))
def test_packed_documents_fit_the_bound(geometry, lengths):
    total = sum(lengths)
    assert sum(map(geometry.num_compressed, lengths)) <= geometry.max_num_compressed(total)
    assert total >= geometry.compress_block_size or not geometry.max_num_compressed(total)  # no block is whole


@given(geometries(), st.integers(0, 200))
def test_select_blocks_cover_the_document_once(geometry, length):
    assert geometry.num_select_blocks(length) == len({t // geometry.select_block_size for t in range(length)})


def test_predicted_reads_at_64k():
    assert BlockGeometry().predicted_reads(65536) == {"cmp": 4095, "slc": 1024, "win": 512}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"compress_stride": 12}, ["12", "32"]),
        ({"select_block_size": 40}, ["16", "40"]),
        ({"compress_block_size": 0}, ["compress_block_size", "0"]),
        ({"num_local_blocks": 0}, ["num_local_blocks", "0"]),
        ({"num_init_blocks": -1}, ["num_init_blocks", "-1"]),
        ({"window_size": 0}, ["window_size"]),
        ({"num_selected_blocks": 2}, ["2", "3"]),
        ({"window_size": 2.5}, ["window_size", "2.5"]),
        ({"window_size": True}, ["window_size"]),
    ],
)
def test_illegal_geometry_names_the_numbers(fields, named):
    with pytest.raises(ValueError, match=".*".join(named)):
        BlockGeometry(**fields)


def test_geometry_is_a_value():
    assert BlockGeometry() == BlockGeometry(*BlockGeometry().as_tuple())
    assert len({BlockGeometry(), BlockGeometry(), BlockGeometry(window_size=1)}) == 2
    with pytest.raises(AttributeError):
        BlockGeometry().window_size = 3  # pyright: ignore[reportAttributeAccessIssue]
