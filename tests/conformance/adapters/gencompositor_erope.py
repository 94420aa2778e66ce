"""GenCompositor's rotary tables: of one video, and of two that are not aligned, in both orders."""

from __future__ import annotations

import torch
from harness import Golden

from effformer.nn.positions import extended_positions
from effformer.nn.rope import GridRope


def check(golden: Golden) -> None:
    c = golden.config
    grid, base, width = (c["T"], c["H"], c["W"]), tuple(c["base_grid"]), c["head_dim"]
    config = GridRope.Config(temperature=1e4, widths=(width // 4, *[3 * width // 8] * 2))
    tables = GridRope(config, width, heads=c["heads"], depth=1, axes=3)
    q = golden.tensor("in.q")
    (plain,) = tables(extended_positions(grid, base=base), like=q)
    golden.assert_close(plain.cos, "out.base_cos")
    golden.assert_close(plain.sin, "out.base_sin")
    released = extended_positions(grid, 2, base=base, order="release")
    (rope,) = tables(released, like=q)
    golden.assert_close(rope.cos, "out.ext_cos")
    golden.assert_close(rope.sin, "out.ext_sin")
    golden.assert_close(rope.query(q), "out.q_release")
    paper = extended_positions(grid, 2, base=base)
    assert torch.equal(released[:, golden.tensor("out.paper_index")], paper)
    (rope,) = tables(paper, like=q)
    golden.assert_close(rope.query(q), "out.q_paper")
