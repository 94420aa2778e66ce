"""Flow-Attention that rotates its features in the last product alone."""

from __future__ import annotations

from harness import Golden
from rotary import check_core, check_stream, site

from effformer.attention import Flow


def check(golden: Golden) -> None:
    for case, c in golden.config.items():
        golden.only("kind", "flow", why="the set is Flow-Attention's", among=c)
        core = Flow(Flow.Config(causal=c.get("causal", False), eps=c["eps"]), site(c))
        check_core(golden, case, c, core)
        if c.get("causal", False):
            like = golden.tensor(f"in.{case}.k")
            state = core.init_state(c["B"], heads=c["H"], head_dim=c["K"], like=like)
            # values are narrower than keys
            state = state._replace(kv=like.new_zeros(c["B"], c["H"], c["K"], c["V"]))
            check_stream(golden, case, c, core, state)
