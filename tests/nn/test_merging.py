"""Token merging against its slow form, and what it must keep."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from effformer.nn.merging import Matching, match_every, match_tokens, merge_schedule, most_merges
from effformer.nn.reference import merge_reference


@pytest.mark.parametrize("n", [2, 9, 14, 15])
@pytest.mark.parametrize("front", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("r", [1, 3, 40])
def test_equals_the_slow_form(n: int, front: int, r: int) -> None:
    if front > n:
        pytest.skip("more protected tokens than tokens")
    metric, x = torch.randn(3, n, 5).double(), torch.randn(3, n, 7).double()
    sizes = torch.randint(1, 5, (3, n)).double()
    matching = match_tokens(metric, r, front=front)
    merged, total = matching.merge(x, sizes), matching.sizes(x, sizes)
    most = most_merges(n, r, front)
    assert merged.shape == (3, n - most, 7)
    if most == 0:
        assert torch.equal(merged, x)
        return
    for i in range(3):
        y, s = merge_reference(metric[i], x[i], sizes[i], most, front=front)
        torch.testing.assert_close(merged[i], y)
        torch.testing.assert_close(total[i], s)


@pytest.mark.parametrize("front", [0, 1, 2, 5])
def test_what_merging_keeps(front: int) -> None:
    metric, x = torch.randn(2, 21, 4), torch.randn(2, 21, 3).double()
    sizes = torch.rand(2, 21).double() + 0.5
    matching = match_tokens(metric, 8, front=front)
    merged, total = matching.merge(x, sizes), matching.sizes(x, sizes)
    torch.testing.assert_close(total.sum(1), sizes.sum(1))
    before, after = (sizes[..., None] * x).sum(1), (total[..., None] * merged).sum(1)
    torch.testing.assert_close(after, before)
    assert torch.equal(merged[:, :front], x[:, :front])
    assert torch.equal(total[:, :front], sizes[:, :front])
    back = matching.unmerge(merged)
    assert back.shape == x.shape
    torch.testing.assert_close(matching.merge(back, sizes), merged)
    source = matching.source()
    assert (source.sum(1) == 1).all()
    torch.testing.assert_close(source.double() @ sizes[..., None], total[..., None])


def test_nothing_to_merge_is_the_identity() -> None:
    x = torch.randn(2, 6, 3)
    for matching in (match_tokens(x, 0), match_tokens(x[:, :1], 3), match_tokens(x, 5, front=6)):
        part = x[:, : matching.count]
        assert torch.equal(matching.merge(part), part)
        assert torch.equal(matching.unmerge(part), part)


def test_samples_do_not_see_each_other() -> None:
    metric = torch.randn(4, 12, 5)
    whole = match_tokens(metric, 4, front=1).groups
    alone = torch.cat([match_tokens(metric[i : i + 1], 4, front=1).groups for i in range(4)])
    assert torch.equal(whole, alone)


def test_half_precision_is_added_up_in_single() -> None:
    metric, x = torch.randn(2, 40, 5), torch.randn(2, 40, 6)
    matching, sizes = match_tokens(metric, 20), torch.randint(1, 300, (2, 40)).float()
    half = x.to(torch.bfloat16)
    out = matching.merge(half, sizes)
    assert out.dtype == torch.bfloat16
    assert matching.sizes(half, sizes).dtype == torch.float32
    exact = matching.merge(half.double(), sizes.double())
    assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)  # half a unit, and the sum in single


def test_gradients() -> None:
    matching = match_tokens(torch.randn(2, 7, 3), 2)
    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    sizes = (torch.rand(2, 7, dtype=torch.float64) + 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: matching.unmerge(matching.merge(x, s)), (x, sizes))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_kth_token_stays(k: int) -> None:
    metric, x = torch.randn(2, 12, 5).double(), torch.randn(2, 12, 3).double()
    matching = match_every(metric, k)
    merged = matching.merge(x)
    assert merged.shape == (2, 12 // k, 3)
    stays = range(k - 1, 12, k)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for b in range(2):
        members: dict[int, list[int]] = {j: [j] for j in stays}
        for i in set(range(12)) - set(stays):
            members[max(stays, key=lambda j: float(unit[b, i] @ unit[b, j]))].append(i)
        expected = torch.stack([x[b, members[j]].mean(0) for j in stays])
        torch.testing.assert_close(merged[b], expected)


class _Merge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        matching = match_tokens(x, 3, front=1)
        return matching.unmerge(matching.merge(x))


def test_captured_graphs() -> None:
    x = torch.randn(2, 9, 4)
    expected = _Merge()(x)
    torch.compiler.reset()
    compiled = torch.compile(_Merge(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(_Merge(), (x,), dynamic_shapes=batch).module()
    y = torch.randn(5, 9, 4)
    torch.testing.assert_close(exported(y), _Merge()(y))


def test_a_graph_serves_a_lone_token() -> None:
    class Merge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            matching = match_tokens(x, 3)
            return matching.unmerge(matching.merge(x))

    axes = {"x": {1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(Merge(), (torch.randn(2, 9, 4),), dynamic_shapes=axes)
    graph = exported.graph_module
    for n in (1, 2, 9, 14):
        x = torch.randn(2, n, 4)
        torch.testing.assert_close(graph(x)[0], Merge()(x))


def test_schedules() -> None:
    assert merge_schedule(5, 3) == (5, 5, 5)
    assert merge_schedule((3, 2), 4) == (3, 2, 0, 0)
    assert merge_schedule((3, 2, 1), 2) == (3, 2)
    assert merge_schedule(8, 12, -1.0)[0] == 16
    assert merge_schedule(8, 12, 1.0)[-1] == 16
    assert merge_schedule(7, 1, 1.0) == (0,)


def test_bad_input() -> None:
    x = torch.randn(1, 6, 2)
    with pytest.raises(ValueError, match="r must not be negative, got -1"):
        match_tokens(x, -1)
    with pytest.raises(ValueError, match="front must not be negative, got -2"):
        match_tokens(x, 1, front=-2)
    with pytest.raises(ValueError, match="at least 2 and divide the 6 tokens, got 4"):
        match_every(x, 4)
    with pytest.raises(ValueError, match=r"inflection must lie in \[-1, 1\], got 2"):
        merge_schedule(3, 4, 2.0)
    with pytest.raises(ValueError, match="r must not be negative, got -3"):
        merge_schedule((1, -3), 4)


def test_sources_are_zeros_and_ones() -> None:
    matching = Matching(torch.tensor([[0, 1, 0]]), 2)
    assert matching.source().tolist() == [[[1, 0, 1], [0, 1, 0]]]
