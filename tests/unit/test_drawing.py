"""Plans as pictures."""

from kvfold.plan.cache_spec import CacheSpec, SourceLayer
from kvfold.plan.number_format import NumberFormat, StoredShape
from kvfold.plan.plan import CachePlan
from kvfold.report.plots import CELLS, bar, described, frontier_plot, plan_plot

TIERS = NumberFormat(tiers=((8, 6), (16, 3)))


def test_a_bar_shows_numbers_and_bits():
    assert bar(StoredShape(1, 24, TIERS), 48, 2) == "▓▓▓▓" + "▒" * 8 + "·" * 12
    assert bar(StoredShape(2, 24), 48, 2) == "█" * CELLS


def test_a_side_is_described():
    assert described(StoredShape(1, 24, TIERS)) == "1 x 24: 8x6 16x3"
    assert described(StoredShape(4, 32, NumberFormat(tiers=((32, 4),), scales="affine"))) == "4 x 32: 4 bits affine"
    assert described(StoredShape(4, 32, NumberFormat(tiers=((32, 3),), scales="normal"))) == "4 x 32: 3 bits normal"
    assert described(StoredShape(4, 32)) == "4 x 32"


def test_plots_are_the_same_bytes_every_time():
    source = SourceLayer(num_attention_heads=2, num_kv_heads=2, head_dim=12)
    spec = CacheSpec(
        num_kv_heads=1, head_dim=24, num_v_heads=1, v_head_dim=24, k_projection=True, v_projection=True, k_bits=TIERS
    )
    plan = CachePlan(dtype="bfloat16", source=(source, source), caches=(spec, None), kv_sharing_target_layer=(None, 0))
    assert plan_plot(plan) == plan_plot(plan) and "16 bits" in plan_plot(plan) and "3 bits" in plan_plot(plan)
    lines = [("auto", [(0.5, 0.001), (0.25, 0.01)]), ("int8", [(0.51, 0.002)])]
    assert frontier_plot(lines) == frontier_plot(lines)
